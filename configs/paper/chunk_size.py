"""FLASH's chunk from 64 to 1,024 tokens at contexts of 1,024 and 8,192.

    python scripts/reproduce.py chunk_size --budget=small

Question: how much quality does a larger chunk buy, and at what speed? The paper uses 256 and reports that larger ones
gain little. Two confounds, shown by `scripts/sweep.py --dry_run`: above 512 the relative bias is rotary in place of a
table, and with the chunk the unit's normaliser grows (n = C). At 1,024 of 1,024 there is no earlier chunk: that point
is FLASH-Quad with FLASH's normaliser.

Arguments: see configs/paper/budgets.py. Results: none of this budget are kept yet but C = 256 and 128, in
docs/results/expansion.md (0.027 worse, one seed).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'chunk_size': Table(
        'Chunk size',
        {'small': 'context:1024:8192,chunk_size,seed:3', 'tiny': 'context:256:512,chunk_size:64:256,seed:2'},
        {'by': 'data.context,model.chunk_size', 'against': 'model.chunk_size=256'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/chunk_size.py:arg`."""
    return budgets.get_config(arg)


def sweep_chunk_size(*sizes: int) -> Iterator[Overrides]:
    """C; by default 64 to 1,024."""
    for size in sizes or (64, 128, 256, 512, 1024):
        yield {'model.chunk_size': size}


def sweep_context(*contexts: int) -> Iterator[Overrides]:
    """Tokens in a sequence, at the same number of tokens a step."""
    for context in contexts:
        yield {':context': context}
