"""The learning rate that each model wants, before models are compared.

    python scripts/reproduce.py learning_rates --budget=small

Question: where is the best rate of each model? relu^2 wanted a higher one than Transformer++ (one seed: 3.908 at 1e-3,
3.776 at 3e-3 against 3.651 and 3.646), so one rate for all would decide the comparison. What this finds goes to
LEARNING_RATES of configs/paper/budgets.py, around which budget `small` looks: the runs in the middle are those that
docs/results/models.md has.

Arguments: see configs/paper/budgets.py. Results: none of this budget are kept yet but those, and one seed of MC-TFM++
at 1.4e-3, 3.776 where it has 3.831 at 4.5e-3 (docs/results/mixed_chunk.md).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'learning_rates': Table(
        'Learning rates',
        {
            'small': 'around,seed:3',
            'tiny': 'models:flash:transformer_plus_plus,rate:3e-3:6e-3,seed:2',
            'paper': 'models,rate:3.5e-4:7e-4:1.4e-3,seed:1',
        },
        {'by': 'model.name,optimizer.learning_rate'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/learning_rates.py:arg`."""
    return budgets.get_config(arg)


def sweep_models(*models: str) -> Iterator[Overrides]:
    """Models by name; by default the three that the other tables are about."""
    for model in models or ('flash', 'flash_quad', 'transformer_plus_plus'):
        yield {':model': model}


def sweep_rate(*rates: float) -> Iterator[Overrides]:
    """Peak learning rates."""
    for rate in rates:
        yield {'optimizer.learning_rate': rate}


def sweep_around(*factors: float) -> Iterator[Overrides]:
    """The three models at the rate of budget `small` times each factor; by default half, the rate, and twice."""
    for point in sweep_models():
        rate = budgets.learning_rate(point[':model'])
        for factor in factors or (0.5, 1.0, 2.0):
            yield {**point, 'optimizer.learning_rate': rate * factor}
