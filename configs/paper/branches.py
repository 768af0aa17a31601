"""FLASH with its local branch only, its global branch only, and both.

    python scripts/reproduce.py branches --budget=small

Question: what does the linear global branch add to exact attention inside chunks? The paper reports that both together
are best and that local alone is better than global alone (no numbers recalled). Global alone has no attention function,
no normaliser and no relative bias: those fields are refused there.

Arguments: see configs/paper/budgets.py. Results: docs/results/branches.md: both are 0.068 better
than local alone and 1.75 better than global alone, which hardly learns.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'branches': Table(
        'Branches of mixed chunk attention',
        {'small': 'branches,seed:3', 'tiny': 'branches,seed:2'},
        {'by': 'model.branches', 'against': 'both'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/branches.py:arg`."""
    return budgets.get_config(arg)


def sweep_branches(*names: str) -> Iterator[Overrides]:
    """Branches by name; by default both together, and each alone."""
    for branches in names or ('both', 'local', 'global'):
        yield {'model.branches': branches}
