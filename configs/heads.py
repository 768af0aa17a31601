"""Is one head enough? FLASH-Quad with heads and without its gate at equal parameters, and the ranks of its attention.

    python scripts/reproduce.py heads --budget=small --per_device=2

Question: the paper says that a gate lets one head do what a Transformer needs eight or twelve for. Does the gate make
up for the rank of A V? One head has one matrix A for all values, but U * (A V) can have a larger rank.

Arguments: those of configs/quality.py (context is 512 here). Sweep: `heads`. Without the gate E is 3 D in place of 2 D,
so that the parameters are as many; heads divide E. Shifted keys, Muon at 4e-3 and no sinusoid, as FLASH of
configs/lm.py has them. A run is 1,000 steps of 65,536 tokens, 66 M tokens; those of the table are 500.

Result (docs/results/heads.md, 500 steps, two seeds): two heads are 0.017 worse than one, eight 0.052. The gate is worth
0.156 and raises the rank from 160 to 299; eight heads raise it to 189.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, quality
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table

TABLES = {
    'heads': Table(
        'Heads and the gate, FLASH-Quad',
        {'small': 'heads,seed:2'},
        {'by': 'point', 'against': 'gau'},
        words={'small': '', 'tiny': 'runlocal'},
        fields=quality.QUARTER,
        ranks={'sequences': '4'},
    )
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/heads.py:arg`."""
    own = common.parse_arg(arg, model='', size='', context=0, data='')
    local = own.runlocal
    defaults = {'model': 'flash_quad', **({} if local else {'context': 512})}
    words = [f'{name}={value}' for name, value in defaults.items() if name not in own.given]
    config = quality.get_config(','.join([*words, *filter(None, [arg])]), checkpoint_steps=1000)
    config.steps = config.steps if local else 1000
    # Eight heads have eight matrices of weights: two micro-batches, or six runs do not share a GPU.
    config.optimizer.accumulation_steps = 2
    config.optimizer.name, config.optimizer.learning_rate = 'muon', 4e-3
    config.model.absolute_position, config.model.key_input = 'none', 'shifted'
    config.model.relative_bias, config.model.relative_bias_scale = 'toeplitz', 2.0
    return config


def sweep_heads() -> Iterator[Overrides]:
    """One head, eight, no gate, neither; then two."""
    no_gate = {'model.gate': 'none', 'model.expansion_factor': 3.0}
    yield {'name': 'gau'}
    yield {'name': 'gau_8_heads', 'model.num_heads': 8}
    yield {'name': 'no_gate', **no_gate}
    yield {'name': 'no_gate_8_heads', **no_gate, 'model.num_heads': 8}
    yield {'name': 'gau_2_heads', 'model.num_heads': 2}
