"""Transformer quality in linear time: FLASH whose bias starts as a mean, the paper's FLASH, and Transformer++.

    python scripts/prepare_data.py --source='jsonl:wiki/*.jsonl' --tokenizer=sentencepiece:FILE --output=data/wiki_en
    python scripts/sweep.py --config=configs/quality.py --sweep=models,seed:8 --workdir=runs/quality --per_device=4
    python scripts/reproduce.py far_books --budget=small --source='jsonl:books/*.jsonl' --tokenizer=sentencepiece:FILE

Question: at equal tokens and equal size, is FLASH as good as Transformer++, and where? configs/relu2.py found the start
of the bias, with three seeds of `small` at 1,024 tokens; here are more seeds, longer contexts, `base`, and for each
model the learning rate that is best for it.

Answer (docs/results/quality.md): FLASH of `best` is ahead at 1,024 tokens of context (p 0.008), on books at 8,192 (by
0.031, p 0.045), and perhaps on Wikipedia at 8,192 (p 0.054).

Arguments: model, size, context, data (any source; by default tokens:data/wiki_en), runlocal. A run is 2,000 steps of
65,536 tokens, 131 M tokens, whatever the context: at `small` and 1,024 it is 5 minutes of an NVIDIA H200 that four runs
share. `seed:N:FIRST` adds seeds to a table. `:runlocal` does not shrink a context that a sweep names, and most name
8,192: `far_books:1024:embedded` is one for a laptop.

Sweeps, and the pages in docs/results that have what came of them:

    models          each model at its best rate                              quality.md
    rates           other rates, and FLASH-Quad                              quality.md
    long            both starts of the bias at 8,192                         quality.md
    base            112 M parameters                                         quality.md
    memory          what FLASH may know of the tokens before its chunk       quality_memory.md
    gate            a gate on the state; take it times seed:3                quality_gate.md
    causes          1,000 steps: what FLASH lacks at 8,192                   quality_causes.md
    muon            with Muon and no sinusoid, as all that follow            quality_muon.md
    forms           every token exactly, a window, a larger rate             quality_keys.md
    convolution     before every layer of either model                       quality_keys.md
    keys            that are found by the token before                       quality_keys.md
    shifted         such keys at two contexts                                quality_shifted.md
    shifted_forms   other rates (not run), softmax and FLASH-Quad (not run),
                    windows, no gate                                         quality_shifted.md
    best            what configs/lm.py took from all this                    quality_shifted.md
    softmax         the same FLASH with softmax: nothing gained              quality_softmax.md
    exact           whole earlier chunks by softmax: four are worth 0.045    quality_softmax.md
    reach           more of these, and other forms                           not run
    books           `best` on books                                          quality_books.md
    far_books       books at 32,768, with far chunks and without; 500 steps  far_memory.md
    base_best       `best` at 112 M: FLASH learns 47 M tokens by heart       quality.md
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import common
from configs.paper import budgets
from gau.experiments.sweep import Overrides
from gau.experiments.table import Evaluation, Page, Table
from gau.training import config as training_config

# What tables of short runs set: a quarter of a run's tokens, with a schedule of their own.
QUARTER = {'small': {'steps': 500, 'eval.every_steps': 250, 'checkpoint.every_steps': 500}}
TABLES = {
    'far_books': Table(
        'Chunks read exactly, on books',
        {'small': 'far_books,seed:2', 'tiny': 'far_books:1024:embedded,seed:1'},
        {'by': 'point', 'against': 'flash'},
        words={'small': '', 'tiny': 'runlocal'},
        fields=QUARTER,
        evaluations=[
            Evaluation(
                {
                    'evaluators': 'eval',
                    'contexts': {'small': '32768,65536,131072', 'tiny': '1024,2048'},
                    'max_tokens': {'small': '2000000', 'tiny': '8192'},
                }
            ),
            Evaluation(
                {
                    'evaluators': {'small': 'passkey:texts=16', 'tiny': 'passkey:texts=2'},
                    'contexts': {'small': '32768,65536,131072', 'tiny': '1024,2048'},
                }
            ),
        ],
        pages={
            'contexts': Page(
                'Whole books by the length of a row, bits per byte',
                {
                    **{'evaluations': '', 'by': 'point', 'split': 'eval/valid', 'metric': 'bits_per_byte'},
                    'allow': 'data',
                },
            ),
            'passkey': Page(
                'Loss of a pass key, told at five places of a text',
                {'evaluations': '', 'by': 'point', 'split': 'passkey/valid', 'allow': 'data'},
            ),
        },
    )
}
RATE = 'optimizer.learning_rate'
MEAN = {':model': 'flash', 'model.relative_bias_init': 'mean', 'model.relative_bias_scale': 2.0}
PAPER = {':model': 'flash', 'model.relative_bias_init': 'normal'}
QUAD = {**MEAN, ':model': 'flash_quad'}
GATED = {':context': 8192, **MEAN, 'model.decay_gate': 'scalar', RATE: 3e-3}
TRANSFORMER = {':model': 'transformer_plus_plus'}
BETTER = {'optimizer.name': 'muon', 'model.absolute_position': 'none', RATE: 4e-3}


def get_config(arg: str | None = None, *, checkpoint_steps: int = 1000) -> ConfigDict:
    """Returns the config for `--config=configs/quality.py:arg`, with a checkpoint every `checkpoint_steps`."""
    arg = common.parse_arg(arg, model='flash', size='small', context=1024, data=budgets.DATA['small'])
    config = training_config.default_config()
    config.model.name = arg.model
    config.model.size = arg.size
    config.data.source = arg.data
    config.data.context = arg.context
    config.data.batch_size = 65_536 // arg.context
    config.steps = 2000
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.98
    config.checkpoint.every_steps = checkpoint_steps
    config.eval.every_steps = 500
    config.eval.max_tokens = 800_000
    config.log.every_steps = 50
    return common.run_local(config, arg.given) if arg.runlocal else config


def sweep_models() -> Iterator[Overrides]:
    """FLASH and Transformer++, each at the best of the learning rates that were tried, Transformer++ at two."""
    yield {'name': 'flash', **MEAN, RATE: 4.5e-3}
    yield {'name': 'transformer_plus_plus', **TRANSFORMER, RATE: 2e-3}
    yield {'name': 'transformer_plus_plus_lr_0.0014', **TRANSFORMER, RATE: 1.4e-3}


def sweep_rates() -> Iterator[Overrides]:
    """Another learning rate, and FLASH-Quad with either form of its bias."""
    yield {'name': 'flash_lr_0.006', **MEAN, RATE: 6e-3}
    for form in ('rotary', 'toeplitz'):
        yield {'name': f'flash_quad_{form}_lr_0.0045', **QUAD, 'model.relative_bias': form, RATE: 4.5e-3}


def sweep_long() -> Iterator[Overrides]:
    """8,192 tokens of context, 8 rows a step: what becomes of both starts and of Transformer++."""
    yield {'name': 'flash_8192_lr_0.0045', ':context': 8192, **MEAN, RATE: 4.5e-3}
    yield {'name': 'transformer_plus_plus_8192_lr_0.002', ':context': 8192, **TRANSFORMER, RATE: 2e-3}
    yield {'name': 'flash_paper_8192_lr_0.006', ':context': 8192, **PAPER, RATE: 6e-3}
    yield {'name': 'flash_8192_lr_0.003', ':context': 8192, **MEAN, RATE: 3e-3}
    for rate in (1e-3, 3e-3):
        yield {'name': f'transformer_plus_plus_8192_lr_{rate:g}', ':context': 8192, **TRANSFORMER, RATE: rate}


def sweep_memory() -> Iterator[Overrides]:
    """8,192 tokens of context: no state, larger chunks, and every token exactly."""
    flash = {':context': 8192, **MEAN, RATE: 3e-3}
    yield {'name': 'local', **flash, 'model.branches': 'local'}
    for size in (512, 1024):
        yield {'name': f'chunk_{size}', **flash, 'model.chunk_size': size}
    yield {'name': 'quad', ':context': 8192, **QUAD, RATE: 3e-3}


def sweep_gate() -> Iterator[Overrides]:
    """8,192 tokens of context: FLASH with a gate on its state against Transformer++ at two learning rates."""
    yield {'name': 'gated', **GATED}
    for rate in (2e-3, 1.4e-3):
        yield {'name': f'transformer_plus_plus_lr_{rate:g}', ':context': 8192, **TRANSFORMER, RATE: rate}


def sweep_causes() -> Iterator[Overrides]:
    """1,000 steps: is it memory, positions, documents in a batch or the optimizer that FLASH lacks at 8,192 tokens?"""
    short = {'steps': 1000}
    gated, local = {**GATED, **short}, {':context': 8192, **MEAN, 'model.branches': 'local', RATE: 3e-3, **short}
    transformer = {':context': 8192, **TRANSFORMER, RATE: 1.4e-3, **short}
    yield {'name': 'gated', **gated}
    yield {'name': 'transformer_plus_plus', **transformer}
    yield {'name': 'local', **local}
    yield {'name': 'local_1024', **local, ':context': 1024}
    # The rows of a batch then follow each other in the text, as the tokens of 8 long rows do.
    yield {'name': 'local_1024_in_order', **local, ':context': 1024, 'data.shuffle': 'documents'}
    yield {'name': 'gated_1024', **gated, ':context': 1024}
    yield {'name': 'transformer_plus_plus_1024', **transformer, ':context': 1024}
    for rate in (1.5e-3, 6e-3):
        yield {'name': f'gated_lr_{rate:g}', **gated, RATE: rate}
    yield {'name': 'gated_no_sinusoid', **gated, 'model.absolute_position': 'none'}
    yield {'name': 'transformer_plus_plus_no_sinusoid', **transformer, 'model.absolute_position': 'none'}
    for name, model in (('gated', gated), ('transformer_plus_plus', transformer)):
        yield {'name': f'{name}_1024_no_sinusoid', **model, ':context': 1024, 'model.absolute_position': 'none'}
    yield {'name': 'gated_clip_global_1', **gated, 'optimizer.clip': 'global', 'optimizer.clip_norm': 1.0}
    for name, model in (('gated', gated), ('transformer_plus_plus', transformer)):
        yield {'name': f'{name}_muon', **model, 'optimizer.name': 'muon', RATE: 4e-3}


def sweep_muon() -> Iterator[Overrides]:
    """8,192 tokens of context: Muon and no sinusoid, which `causes` found, to the end, each model at two rates."""
    transformer = {':context': 8192, **TRANSFORMER}
    for rate in (4e-3, 2e-3):
        for name, model in (('gated', GATED), ('transformer_plus_plus', transformer)):
            yield {'name': f'{name}_muon_lr_{rate:g}', **model, **BETTER, RATE: rate}


def sweep_convolution() -> Iterator[Overrides]:
    """8,192 tokens of context, Muon and no sinusoid: each model without and with a convolution before its layers."""
    for name, model in (('gated', GATED), ('transformer_plus_plus', {':context': 8192, **TRANSFORMER})):
        yield {'name': name, **model, **BETTER}
        yield {'name': f'{name}_convolution', **model, **BETTER, 'model.short_convolution': 3}


def sweep_keys() -> Iterator[Overrides]:
    """8,192 tokens of context, Muon and no sinusoid: keys that can be found by the token before them."""
    for width in (0, 3):
        for keys in ('shifted', 'own'):
            name = f'keys_{keys}_convolution' if width else f'keys_{keys}'
            yield {'name': name, **GATED, **BETTER, 'model.key_input': keys, 'model.short_convolution': width}


def sweep_shifted() -> Iterator[Overrides]:
    """Muon and no sinusoid, 8,192 and 1,024 tokens of context: FLASH with a gate and shifted keys, Transformer++."""
    shifted = {**GATED, **BETTER, 'model.key_input': 'shifted'}
    for context in (8192, 1024):
        for name, model in (('shifted', shifted), ('transformer_plus_plus', {**TRANSFORMER, **BETTER})):
            yield {'name': f'{name}_{context}', **model, ':context': context}


def sweep_shifted_forms() -> Iterator[Overrides]:
    """8,192 tokens of context: other rates of shifted keys, and what else may go with them or without."""
    shifted = next(sweep_shifted())
    for rate in (2e-3, 8e-3):
        yield {**shifted, 'name': f'shifted_lr_{rate:g}', RATE: rate}
    yield {**shifted, 'name': 'shifted_no_gate', 'model.decay_gate': 'none'}
    for size in (128, 256):
        yield {**shifted, 'name': f'shifted_window_2_chunk_{size}', 'model.chunk_size': size, 'model.local_window': 2}
    yield {**_softmax(shifted), 'name': 'shifted_softmax'}
    exact = {path: value for path, value in shifted.items() if path != 'model.decay_gate'}
    yield {**exact, 'name': 'shifted_quad', ':model': 'flash_quad'}


def sweep_exact() -> Iterator[Overrides]:
    """FLASH with a chunk by itself, and softmax over whole ones before it."""
    shifted = next(sweep_shifted())
    for context in (8192, 1024):
        for count in (1, 4) if context == 8192 else (1,):
            yield {**shifted, 'name': f'exact_{count}_{context}', ':context': context, 'model.far_chunks': count}


def sweep_reach() -> Iterator[Overrides]:
    """8,192 tokens of context: more whole chunks, smaller ones, without RoPE between chunks, without a gate."""
    shifted = next(sweep_shifted())
    for size, count in ((256, 2), (256, 8), (128, 4), (128, 8)):
        yield {**shifted, 'name': f'chunk_{size}_far_{count}', 'model.chunk_size': size, 'model.far_chunks': count}
    four = {**shifted, 'model.far_chunks': 4}
    yield {**four, 'name': 'chunk_256_far_4_rope_local', 'model.rope': 'local'}
    yield {**four, 'name': 'chunk_256_far_4_no_gate', 'model.decay_gate': 'none'}


def sweep_best() -> Iterator[Overrides]:
    """FLASH as configs/lm.py has it and Transformer++ at two contexts, each model at one rate; take it times seed:3."""
    flash = {f'model.{field}': value for field, value in common.BEST_FLASH.items()}
    for context in (8192, 1024):
        for name, model in (('flash', {**MEAN, **flash}), ('transformer_plus_plus', TRANSFORMER)):
            yield {'name': f'{name}_{context}', ':context': context, **model, **BETTER}


def sweep_softmax() -> Iterator[Overrides]:
    """FLASH of `best` with softmax in its window, at two contexts; take it times seed:3."""
    for point in sweep_best():
        if point[':model'] == 'flash':
            yield {**_softmax(point), 'name': point['name'].replace('flash', 'softmax')}


def sweep_books() -> Iterator[Overrides]:
    """Whole books (`prepare_data.py --output=data/books`), 8,192 tokens of context: the models of `best`."""
    for point in list(sweep_best())[:2]:
        yield {**point, 'name': point['name'].replace('8192', 'books'), ':data': 'tokens:data/books'}


def sweep_far_books(context: int = 32_768, data: str = 'tokens:data/books') -> Iterator[Overrides]:
    """Whole books in long rows: FLASH of `best`, without RoPE between chunks, with chunks read exactly.

    Rotated keys differ by where they stand, so their mean says less of what is in a chunk.
    """
    flash = {**next(sweep_best()), ':context': context, ':data': data, 'name': 'flash'}
    local = {**flash, 'model.rope': 'local'}
    yield {**local, 'name': 'rope_local_far_4', 'model.far_chunks': 4}
    yield flash
    yield {**local, 'name': 'rope_local'}


def sweep_forms() -> Iterator[Overrides]:
    """8,192 tokens of context, Muon and no sinusoid: every token exactly, other memories, a larger rate."""
    yield {'name': 'quad', ':context': 8192, **QUAD, **BETTER}
    yield {'name': 'window_2_chunk_128', **GATED, **BETTER, 'model.chunk_size': 128, 'model.local_window': 2}
    yield {'name': 'transformer_plus_plus_lr_0.008', ':context': 8192, **TRANSFORMER, **BETTER, RATE: 8e-3}


def sweep_base() -> Iterator[Overrides]:
    """112 M parameters: both starts at one learning rate, and Transformer++."""
    yield {'name': 'flash_base', ':size': 'base', **MEAN, RATE: 3e-3}
    yield {'name': 'flash_paper_base', ':size': 'base', **PAPER, RATE: 3e-3}
    yield {'name': 'transformer_plus_plus_base', ':size': 'base', **TRANSFORMER, RATE: 1e-3}


def sweep_base_best(steps: int = 4578) -> Iterator[Overrides]:
    """112 M parameters, 8,192 tokens of context, 300 M tokens: the models of `best`, for the time to a quality.

    They need a text of 90 M tokens or more: one of 47 M is learnt by heart after three passes
    (docs/results/quality.md), and `base_best:2000` is for that.
    """
    for point in list(sweep_best())[:2]:
        yield {**point, 'name': point['name'].replace('8192', 'base'), ':size': 'base', 'steps': steps}


def _softmax(point: Overrides) -> Overrides:
    """Returns a point of FLASH with softmax, which has no use for relu^2's start of the bias."""
    bare = {path: value for path, value in point.items() if not path.startswith('model.relative_bias')}
    return {**bare, 'model.attention_function': 'softmax'}
