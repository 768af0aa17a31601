"""How FLASH knows positions: the sinusoid at the input, RoPE on queries and keys, the relative bias in the chunk.

    python scripts/reproduce.py positions --budget=small

Question: which of the three does it need? Without a relative bias gamma starts at ones, or a relu^2 layer would be
dead: the three points without one change two things. `none` still has chunks, whose borders tell something of
positions.

Arguments: see configs/paper/budgets.py. Results: none of this budget are kept yet.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'positions': Table(
        'Positions in FLASH',
        {'small': 'positions,seed:3', 'tiny': 'positions,seed:2'},
        {
            'by': 'model.absolute_position,model.rope,model.relative_bias',
            'against': 'model.absolute_position=sinusoid,model.rope=rotary,model.relative_bias=toeplitz',
        },
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/paper/positions.py:arg`."""
    return budgets.get_config(arg)


def sweep_positions() -> Iterator[Overrides]:
    """All three, one left out or changed, and none."""
    no_sinusoid = {'model.absolute_position': 'none'}
    no_rope = {'model.rope': 'none'}
    no_bias = {'model.relative_bias': 'none'}
    yield {'name': 'all'}
    yield {'name': 'no_sinusoid', **no_sinusoid}
    yield {'name': 'no_rope', **no_rope}
    yield {'name': 'rotary_bias', 'model.relative_bias': 'rotary'}
    yield {'name': 'no_bias', **no_bias}
    yield {'name': 'rope_alone', **no_sinusoid, **no_bias}
    yield {'name': 'bias_alone', **no_sinusoid, **no_rope}
    yield {'name': 'none', **no_sinusoid, **no_rope, **no_bias}
