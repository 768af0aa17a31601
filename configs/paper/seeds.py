"""How far apart runs are that differ in their seed alone: five seeds of FLASH and of Transformer++.

    python scripts/reproduce.py seeds --budget=small

Question: what is the standard deviation between seeds at this budget? Every other table of the budget is read with it:
with n seeds a row, differences below about 3 sigma / sqrt(n) say nothing.

Arguments: see configs/paper/budgets.py. Results: docs/results/seeds.md: 0.024.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'seeds': Table(
        'Spread between seeds',
        {'small': 'models,seed:5', 'tiny': 'models,seed:3'},
        {'by': 'model.name', 'against': 'transformer_plus_plus'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/seeds.py:arg`."""
    return budgets.get_config(arg)


def sweep_models() -> Iterator[Overrides]:
    """The two models that are compared most."""
    for model in ('flash', 'transformer_plus_plus'):
        yield {':model': model}
