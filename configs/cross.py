"""Is one head enough to read another sequence? Encoder-decoders with a Cross-GAU, and with multi-head cross-attention.

    python scripts/reproduce.py cross --budget=small --per_device=2
    python scripts/reproduce.py titles --budget=small --source='jsonl:wiki/*.jsonl' --tokenizer=sentencepiece:FILE

Question: the paper says that with a gate one head does what a Transformer needs many for. Is that so where queries come
from one sequence, and keys and values from another? The tasks: the second half of a passage from its first
(task=halves), and the title of a Wikipedia article from the beginning of its text (task=titles).

Arguments: model (cross_flash, cross_transformer_plus_plus; any causal one as a control that sees no source), size,
context (source and target have half of it each), task, data, tokenizer, runlocal. Sweeps:
  heads      a Cross-GAU with one, two and four heads in FLASH
  controls   multi-head cross-attention in FLASH and in Transformer++, and each without a source
  softmax    a Cross-GAU with softmax in place of relu^2

A run is 1,000 steps of 65,536 places, half of them targets at most; those of the tables are 500, of titles 300. Titles:
512 places a row, one row for each article, of which every tenth is held out. A Cross-GAU has E = D and nine tenths of
the parameters of multi-head cross-attention. All have Muon at 4e-3 and no sinusoid; FLASH has shifted keys within its
sequences, Transformer++ with a source embeddings times sqrt(D).

Result (docs/results/cross.md): halves of a passage do not tell the units apart: one, two and four heads and multi-head
attention are within 0.008 of each other (n = 2), where the source is worth 0.041. Titles do: the source is worth 2.9
nats to one head and to two, and 3.8 to six heads with softmax (n = 1). Not run yet: `softmax`, which tells whether it
is the heads. `:runlocal` predicts halves (or the names) of the files of the embedded corpus for 20 steps, and shows
that everything works.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common, quality
from gau.errors import UserError, did_you_mean
from gau.experiments.sweep import Overrides
from gau.experiments.table import Table
from gau.models.families import cross

CROSS = Table(
    'The second half of a passage from its first',
    {'small': 'heads+controls,seed:2', 'tiny': 'heads+controls,seed:1'},
    {'by': 'point', 'against': 'gau_1'},
    words={'small': '', 'tiny': 'runlocal'},
    fields=quality.QUARTER,
)
TABLES = {
    'cross': CROSS,
    'titles': CROSS._replace(
        title='The title of an article from the beginning of its text',
        sweeps={'small': 'heads+controls+softmax,seed:2', 'tiny': 'heads+controls,seed:1'},
        words={'small': 'task=titles', 'tiny': 'task=titles,runlocal'},
        # Three passes over 11,000 articles, and they are known by heart.
        fields={'small': {'steps': 300, 'eval.every_steps': 150, 'checkpoint.every_steps': 300}},
    ),
}
CONTEXTS = {'halves': 1024, 'titles': 512}
TITLES = 'jsonl:wiki/*.jsonl'


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/cross.py:arg`."""
    # Before the fields of a config are collected.
    cross.register()
    arg = common.parse_arg(arg, model='cross_flash', size='small', context=0, task='halves', data='', tokenizer='')
    if arg.task not in CONTEXTS:
        raise UserError(f'config argument task={arg.task} is unknown{did_you_mean(arg.task, CONTEXTS)}')
    context = arg.context or CONTEXTS[arg.task]
    config = quality.get_config(f'model={arg.model},size={arg.size},context={context}', checkpoint_steps=1000)
    config.objective = arg.task
    config.model.absolute_position = 'none'
    if arg.model in ('cross_flash', 'flash'):
        # Of what mended FLASH (docs/results/quality_shifted.md) the part that an encoder can have.
        config.model.key_input = 'shifted'
    if arg.model == 'cross_transformer_plus_plus':
        # Without it the source made the model worse than none (docs/results/cross.md).
        config.model.embedding_scale = 'width'
    config.steps = 1000
    config.optimizer.name = 'muon'
    config.optimizer.learning_rate = 4e-3
    config.eval.every_steps = 250
    if arg.task == 'titles':
        config.data.source, config.data.holdout_every = TITLES, 10
    if arg.data:
        config.data.source = arg.data
    if arg.tokenizer:
        config.data.tokenizer = arg.tokenizer
    if arg.runlocal:
        common.run_local(config, arg.given)
        if config.data.source == 'embedded':
            # Its held-out files are always the same.
            config.data.holdout_every = None
    return config


def sweep_heads() -> Iterator[Overrides]:
    """A Cross-GAU with one, two and four heads."""
    for heads in (1, 2, 4):
        yield {'name': f'gau_{heads}', ':model': 'cross_flash', 'model.cross_heads': heads}


def sweep_controls() -> Iterator[Overrides]:
    """Multi-head cross-attention in FLASH and in Transformer++, and either decoder without a source."""
    yield {'name': 'multi_head', ':model': 'cross_flash', 'model.cross_unit': 'multi_head'}
    yield {'name': 'transformer_plus_plus', ':model': 'cross_transformer_plus_plus'}
    yield {'name': 'no_source', ':model': 'flash'}
    yield {'name': 'transformer_plus_plus_no_source', ':model': 'transformer_plus_plus'}


def sweep_softmax() -> Iterator[Overrides]:
    """The same heads with softmax."""
    for heads in (1, 2, 4):
        softmax = {'model.cross_heads': heads, 'model.cross_function': 'softmax'}
        yield {'name': f'gau_{heads}_softmax', ':model': 'cross_flash', **softmax}
