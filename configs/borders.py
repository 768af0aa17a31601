"""Where the border between chunks hurts: FLASH's loss by the place of a token in its chunk, small, 8,192.

    python scripts/sweep.py --config=configs/borders.py --sweep=chunks+remedies --workdir=runs/borders --per_device=4
    python eval.py --workdir=runs/borders/chunk_256 --evaluators=borders     # the loss by place, of every run

Question: a chunk's first tokens see the text before them through the state alone. How much does that cost for C of 64,
256 and 1,024, and how much of it do a gate of the state and a window of two chunks give back? Transformer++, which has
no borders, is measured at the same places (--config.evaluators.borders.chunk=64 for those of other chunks).

Arguments: size, data (any source; by default tokens:data/wiki_en), runlocal. Sweeps: `chunks`, `remedies`. The relative
bias is a table for every C, so that it does not change with it.

A run is 1,000 steps of 8 rows of 8,192 tokens, 66 M tokens. `border_loss` (the mean over that of the second half of the
chunks) stands in metrics.jsonl. All targets but the first 1,024 of a row count, so those of every chunk are the same.

Result: not run yet.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, quality
from gau.experiments.sweep import Overrides

CHUNKS = (64, 256, 1024)
FLASH = {**quality.MEAN, 'model.relative_bias': 'toeplitz', quality.RATE: 3e-3}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/borders.py:arg`."""
    local = common.parse_arg(arg, model='', size='', data='').runlocal
    words = [] if local else ['context=8192']
    config = quality.get_config(','.join([*words, *filter(None, [arg])]), checkpoint_steps=1000)
    config.steps = config.steps if local else 1000
    entry = {'type': 'perplexity_in_chunk', 'skip': 0 if local else max(CHUNKS), 'every_percent': 100}
    # A model without chunks is measured at the places of FLASH's.
    entry['chunk'] = 256 if 'transformer' in config.model.name else 0
    config.evaluators.borders = entry
    return config


def sweep_chunks() -> Iterator[Overrides]:
    """Every C, and Transformer++."""
    for chunk in CHUNKS:
        yield {'name': f'chunk_{chunk}', **FLASH, 'model.chunk_size': chunk}
    yield {'name': 'transformer_plus_plus', **quality.TRANSFORMER, quality.RATE: 2e-3}


def sweep_remedies() -> Iterator[Overrides]:
    """Every C with a gate of the state, and with a window of two chunks."""
    for chunk in (256, 64, 1024):
        own = {**FLASH, 'model.chunk_size': chunk}
        yield {'name': f'chunk_{chunk}_gate', **own, 'model.decay_gate': 'scalar'}
        yield {'name': f'chunk_{chunk}_window_2', **own, 'model.local_window': 2}
