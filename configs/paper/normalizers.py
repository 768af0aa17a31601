"""What FLASH's relu^2 attention divides by, with and without a learned temperature.

    python scripts/reproduce.py normalizers --budget=small

Question: q.k enters relu^2 as 1 / n^2; does the paper's n (the chunk's length here) hold the unit back? `su` divides
inside by sqrt(S) and outside by the keys that a query sees. softmax, which has no normaliser, is the other end. With
`su` the relative bias starts as N(0, 0.02) and not as a mean: that point changes two things; with the argument
recipe=paper all start so.

Arguments: see configs/paper/budgets.py. Results: none of this budget are kept yet; one seed each, all with that start,
had 3.776 (paper), 3.830 (su), 3.630 (softmax with gamma from ones).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'normalizers': Table(
        'Normalisers of relu^2 attention',
        {'small': 'normalizer+temperature+softmax,seed:3', 'tiny': 'normalizer+softmax,seed:2'},
        {
            'by': 'model.attention_function,model.normalizer,model.temperature',
            'against': 'model.attention_function=relu2,model.normalizer=paper,model.temperature=none',
        },
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/normalizers.py:arg`."""
    return budgets.get_config(arg)


def sweep_normalizer() -> Iterator[Overrides]:
    """Every normaliser."""
    for normalizer in ('paper', 'fixed', 'visible', 'su'):
        yield {'model.normalizer': normalizer}


def sweep_temperature() -> Iterator[Overrides]:
    """A learned factor on q.k, where the size of q.k matters most and least."""
    for normalizer in ('paper', 'su'):
        yield {'model.temperature': 'learned', 'model.normalizer': normalizer}


def sweep_softmax() -> Iterator[Overrides]:
    """Softmax in the chunk."""
    yield {'name': 'softmax', 'model.attention_function': 'softmax'}
