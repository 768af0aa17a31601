"""Where the border between chunks hurts, and what mends it: FLASH's loss by the place of a token in its chunk.

    python scripts/reproduce.py borders --budget=small --per_device=3
    python scripts/reproduce.py overlap_layers --budget=small --per_device=3     # docs/results/overlap.md

Question: a chunk's first tokens see the text before them through the state alone. What does that cost at chunks of 64,
256 and 1,024 tokens, and how much of it do a gate on the state and a window of two chunks give back?

Arguments: model, size, data (any source; by default tokens:data/wiki_en), runlocal. Sweeps:
  chunks     the three sizes, and Transformer++, which has no borders, measured at the same places
             (--evaluators=borders:chunk=64 for those of other chunks)
  overlap    a window against more layers at its cost
  far        whole chunks from far away
  remedies   gate and window at the other sizes, and the window alone

All have shifted keys, Muon at 4e-3 and no sinusoid, as configs/lm.py does; chunk_128_gate_window_2 is what that gives.
The relative bias is a table for every size, so that it does not change with it.

A run is 1,000 steps of 8 rows of 8,192 tokens, 66 M tokens, `small`; those of the tables are 500. metrics.jsonl has
`border_loss` (the mean over that of the second half of the chunks), and `new_loss` and `repeated_loss` of pairs of
tokens. The first 1,024 targets of a row do not count for `border_loss`, so that its targets are the same for every
size.

Result (docs/results/borders.md, 500 steps, two seeds): a border costs the sixteen tokens after it. A gate gives back
two thirds of it, a window all of it. Four far chunks are worth 0.153, all of it where pairs are repeated, and 0.117 of
it is the chunk before. Two more layers are worth 0.016 in 33 M tokens, as much as a window of 128
(docs/results/overlap.md).
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, quality
from gau.experiments.sweep import Overrides
from gau.experiments.table import Evaluation, Page, Table

# Pairs of a token and the one before it that have not stood in the row before, and those that have.
REPEATED = {
    kind: Page(title, {'by': 'point', 'split': 'repeated/valid', 'metric': f'{kind}_loss'})
    for kind, title in (('new', 'Loss of new pairs'), ('repeated', 'Loss of repeated pairs'))
}
BY_PLACE = {'evaluations': '', 'by': 'point', 'metric': 'border_loss'}
TABLES = {
    'borders': Table(
        'Borders between chunks',
        {'small': 'overlap+chunks+far+remedies,seed:2', 'tiny': 'overlap+chunks+far+remedies,seed:1'},
        {'by': 'point', 'against': 'chunk_256'},
        words={'small': '', 'tiny': 'runlocal'},
        fields=quality.QUARTER,
        evaluations=[
            Evaluation({'evaluators': 'borders,repeated'}),
            # A model without chunks at the places of all sizes; those of 256 are its own.
            *(
                Evaluation({'evaluators': f'borders:chunk={chunk}'}, 'transformer_plus_plus')
                for chunk in (64, 128, 1024)
            ),
        ],
        pages={
            'bare': Page(
                'Loss by place in the chunk: nothing mends the borders',
                {**BY_PLACE, 'allow': 'data'},
                ('chunk_64', 'chunk_256', 'chunk_1024', 'transformer_plus_plus'),
            ),
            'mended': Page(
                'Loss by place in the chunk: gate, window, chunks read exactly',
                BY_PLACE,
                ('*_window_2', 'chunk_256_gate', 'chunk_256_gate_far_*'),
            ),
            **REPEATED,
        },
    ),
    'overlap_layers': Table(
        'A window of two chunks against two more layers',
        {'small': 'overlap,seed:2', 'tiny': 'overlap,seed:1'},
        {
            'by': 'model.num_layers,model.local_window,model.chunk_size',
            'against': {
                'small': 'model.num_layers=12,model.local_window=1,model.chunk_size=256',
                'tiny': 'model.num_layers=4,model.local_window=1,model.chunk_size=256',
            },
        },
        words={'small': '', 'tiny': 'runlocal'},
        fields=quality.QUARTER,
        pages=REPEATED,
    ),
}
CHUNKS = (256, 64, 1024)
FLASH = {**quality.MEAN, 'model.relative_bias': 'toeplitz', 'model.key_input': 'shifted'}
GATE, WINDOW = {'model.decay_gate': 'scalar'}, {'model.local_window': 2}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/borders.py:arg`."""
    local = common.parse_arg(arg, model='', size='', data='').runlocal
    # On a laptop, too, a row has two of the longest chunks: a single one has no border.
    words = [f'context={2 * max(CHUNKS) if local else 8192}']
    config = quality.get_config(','.join([*words, *filter(None, [arg])]), checkpoint_steps=1000)
    config.steps = config.steps if local else 1000
    config.model.absolute_position = 'none'
    config.optimizer.name, config.optimizer.learning_rate = 'muon', 4e-3
    entry = {'type': 'perplexity_in_chunk', 'skip': 0 if local else max(CHUNKS), 'every_percent': 100}
    # A model without chunks is measured at the places of FLASH's.
    entry['chunk'] = 256 if 'transformer' in config.model.name else 0
    config.evaluators.borders = entry
    config.evaluators.repeated = {'type': 'perplexity_by_repetition', 'every_percent': 100}
    return config


def sweep_chunks() -> Iterator[Overrides]:
    """Every C, with nothing that mends its borders, and Transformer++."""
    for chunk in CHUNKS:
        yield {'name': f'chunk_{chunk}', **FLASH, 'model.chunk_size': chunk}
    yield {'name': 'transformer_plus_plus', **quality.TRANSFORMER}


def sweep_overlap() -> Iterator[Overrides]:
    """With a gate: chunks of 256, the same with a window of two, 14 layers at its cost; and a window at that of 256."""
    gated = {**FLASH, **GATE, 'model.chunk_size': 256}
    yield {'name': 'chunk_256_gate', **gated}
    yield {'name': 'chunk_256_gate_window_2', **gated, **WINDOW}
    yield {'name': 'chunk_256_gate_14_layers', **gated, 'model.num_layers': 14}
    yield {'name': 'chunk_128_gate_window_2', **gated, **WINDOW, 'model.chunk_size': 128}


def sweep_far() -> Iterator[Overrides]:
    """With a gate: each chunk of queries reads the chunk before and the three that fit best, exactly; and it alone."""
    for count in (4, 1):
        fields = {'model.chunk_size': 256, 'model.far_chunks': count}
        yield {'name': f'chunk_256_gate_far_{count}', **FLASH, **GATE, **fields}


def sweep_remedies() -> Iterator[Overrides]:
    """Gate and window for the other C, and the window alone."""
    for chunk in CHUNKS[1:]:
        yield {'name': f'chunk_{chunk}_gate_window_2', **FLASH, **GATE, **WINDOW, 'model.chunk_size': chunk}
    yield {'name': 'chunk_256_window_2', **FLASH, **WINDOW, 'model.chunk_size': 256}
