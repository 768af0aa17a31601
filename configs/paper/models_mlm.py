"""The same as configs/paper/models.py with masked tokens, and with Linformer.

    python scripts/reproduce.py models_mlm --budget=small

Question: the paper's main table (C4 at 8,192, perplexity, recalled: FLASH 3.897, Transformer++ 3.933). Learning rates
are those of the language models, looked for with masked tokens for none (configs/paper/budgets.py). Sweep `contexts`
sets the paper's five lengths beside each other.

Arguments: see configs/paper/budgets.py. Results: docs/results/models_mlm.md, four of nine so far: FLASH is 0.28 ahead
of Transformer++.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets, models
from configs.paper.models import sweep_contexts  # noqa: F401  a sweep of this program, too
from gau.experiments.sweep import Overrides

TABLES = {'models_mlm': models.TABLES['models']._replace(title='Models as masked language models')}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/models_mlm.py:arg`."""
    return budgets.get_config(arg, objective='mlm')


def sweep_models(*names: str) -> Iterator[Overrides]:
    """Models by name; by default all."""
    return models.sweep_models(*(names or (*models.MODELS, 'linformer')))
