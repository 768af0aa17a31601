"""Which norm FLASH has, and where.

    python scripts/reproduce.py norms --budget=small

Question: is ScaleNorm, one number a layer, as good as LayerNorm and RMSNorm, and does pre-norm matter? The paper takes
ScaleNorm and LayerNorm for what the task prefers. GLM reports that a GAU of 110 M parameters diverged with pre-norm and
trained with the sandwich norm, which normalises what a unit adds as well. Only ScaleNorm in pre-norm is fused with
kernels on a GPU; the others run through XLA, so their speeds say less.

Arguments: see configs/paper/budgets.py. Results: none of this budget are kept yet.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table
from gau.models.fields import COMMON

TABLES = {
    'norms': Table(
        'Norms in FLASH',
        {'small': 'norm,placement,seed:3', 'tiny': 'norm,placement,seed:2'},
        {'by': 'model.norm,model.norm_placement', 'against': 'model.norm=scale_norm,model.norm_placement=pre'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/norms.py:arg`."""
    return budgets.get_config(arg)


def sweep_norm() -> Iterator[Overrides]:
    """Every norm there is."""
    for norm in COMMON['norm'].choices:
        yield {'model.norm': norm}


def sweep_placement() -> Iterator[Overrides]:
    """Every place there is for it."""
    for placement in COMMON['norm_placement'].choices:
        yield {'model.norm_placement': placement}
