"""Where the relative bias of relu^2 starts: FLASH with two starts, with softmax, FLASH-Quad and Transformer++, small.

    python scripts/prepare_data.py --source='jsonl:wiki/*.jsonl' --tokenizer=sentencepiece:FILE --output=data/wiki_en
    python scripts/sweep.py --config=configs/relu2.py --sweep=models+rate,seed:3 --workdir=runs/relu2 --per_device=4

Question: is relu^2 behind softmax, and FLASH behind Transformer++, because of where the bias starts?

Answer (docs/results/relu2.md): mostly, yes. The held-out loss of FLASH on English Wikipedia is 3.76 with the paper's
start and 3.62 with the other; Transformer++ has 3.65 (means of three seeds).

Arguments: those of configs/quality.py. A run is 2,000 steps of 64 rows of 1,024 tokens, 131 M tokens: 5 minutes of an
NVIDIA H200 that four runs share. Sweeps:
  models     those that are compared
  rate       one more learning rate
  trials     what was tried on one seed
  mlm        masked language modelling
  remedies   what else might mend the paper's start (not run yet)
  chunks     both starts in smaller and larger chunks (not run yet)
  lengths    a document a row, so that lengths are mixed (not run yet)
  long       both starts, four times the tokens: a slow start, or a ceiling? 524 M tokens need a text of 100 M or more
             (not run yet)
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import quality
from gau.experiments.sweep import Overrides

NAME, RATE = 'model.name', 'optimizer.learning_rate'
START, SCALE = 'model.relative_bias_init', 'model.relative_bias_scale'
SOFTMAX = {'model.attention_function': 'softmax', 'model.gamma_init': 'ones'}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/relu2.py:arg`."""
    return quality.get_config(arg, checkpoint_steps=2000)


def sweep_models() -> Iterator[Overrides]:
    """The models that are compared over seeds."""
    yield {'name': 'transformer_plus_plus', NAME: 'transformer_plus_plus', RATE: 2e-3}
    yield {'name': 'flash_normal', START: 'normal', RATE: 6e-3}
    yield {'name': 'flash_mean', START: 'mean', SCALE: 2.0, RATE: 3e-3}
    yield {'name': 'flash_softmax', RATE: 6e-3, **SOFTMAX}


def sweep_rate() -> Iterator[Overrides]:
    """FLASH with the other start at a learning rate that proved better still, found last."""
    yield {'name': 'flash_mean_lr_0.0045', START: 'mean', SCALE: 2.0, RATE: 4.5e-3}


def sweep_trials() -> Iterator[Overrides]:
    """Size of the start, learning rates, gamma, chunk; and FLASH-Quad with a table as long as the context."""
    for rate in (1.5e-3, 3e-3, 6e-3):
        yield {'name': f'flash_mean_x1_lr_{rate:g}', START: 'mean', SCALE: 1.0, RATE: rate}
    for scale in (0.5, 2.0, 4.0):
        yield {'name': f'flash_mean_x{scale:g}_lr_0.003', START: 'mean', SCALE: scale, RATE: 3e-3}
    yield {'name': 'flash_mean_x2_lr_0.0045', START: 'mean', SCALE: 2.0, RATE: 4.5e-3}
    mean = {START: 'mean', SCALE: 2.0, RATE: 3e-3}
    yield {'name': 'flash_mean_x2_gamma_ones_lr_0.003', 'model.gamma_init': 'ones', **mean}
    yield {'name': 'flash_mean_x2_chunk_512_lr_0.003', 'model.chunk_size': 512, **mean}
    yield {'name': 'flash_normal_lr_0.006', START: 'normal', RATE: 6e-3}
    for rate in (6e-3, 1e-2):
        yield {'name': f'flash_softmax_lr_{rate:g}', RATE: rate, **SOFTMAX}
    quad = {NAME: 'flash_quad', 'model.relative_bias': 'toeplitz', RATE: 3e-3}
    yield {'name': 'flash_quad_normal_lr_0.003', START: 'normal', **quad}
    for scale in (1.0, 2.0):
        yield {'name': f'flash_quad_mean_x{scale:g}_lr_0.003', START: 'mean', SCALE: scale, **quad}
    yield {'name': 'transformer_plus_plus_lr_0.002', NAME: 'transformer_plus_plus', RATE: 2e-3}


def sweep_mlm() -> Iterator[Overrides]:
    """The same four models on masked tokens, at the learning rates that were best for `models`."""
    yield from ({**point, 'objective': 'mlm'} for point in sweep_models())


def sweep_remedies() -> Iterator[Overrides]:
    """The paper's start with functions that are not flat below zero, own rates, other clipping, other norms."""
    paper = {START: 'normal', RATE: 6e-3}
    yield {'name': 'paper', **paper}
    for function in ('laplace', 'softplus2', 'smooth_relu2'):
        # These have one start, the paper's.
        yield {'name': function, 'model.attention_function': function, RATE: 6e-3}
    for name in ('relative_bias', 'gamma'):
        yield {'name': f'{name}_rate_x10', **paper, 'optimizer.learning_rate_rules': ((name, 10.0),)}
    yield {'name': 'clip_global_1', **paper, 'optimizer.clip': 'global', 'optimizer.clip_norm': 1.0}
    yield {'name': 'clip_none', **paper, 'optimizer.clip': 'none'}
    for placement in ('post', 'sandwich'):
        yield {'name': placement, **paper, 'model.norm_placement': placement}
    yield {'name': 'layer_norm', **paper, 'model.norm': 'layer_norm'}


def sweep_chunks() -> Iterator[Overrides]:
    """Both starts in chunks of 64, 128 and 512."""
    for size in (64, 128, 512):
        yield {'name': f'paper_{size}', START: 'normal', RATE: 6e-3, 'model.chunk_size': size}
        yield {'name': f'mean_{size}', START: 'mean', SCALE: 2.0, RATE: 4.5e-3, 'model.chunk_size': size}


def sweep_lengths() -> Iterator[Overrides]:
    """A document a row, cut at the context: rows of all lengths, in FLASH and FLASH-Quad, by relu^2 and by softmax."""
    for model in ('flash', 'flash_quad'):
        row = {':model': model, 'data.packing': 'document'}
        yield {'name': f'{model}_relu2', **row, START: 'mean', SCALE: 2.0, RATE: 4.5e-3}
        yield {'name': f'{model}_softmax', **row, RATE: 6e-3, **SOFTMAX}


def sweep_long() -> Iterator[Overrides]:
    """Both starts over 524 M tokens."""
    yield {'name': 'paper', START: 'normal', RATE: 6e-3, 'steps': 8000}
    yield {'name': 'mean', START: 'mean', SCALE: 2.0, RATE: 4.5e-3, 'steps': 8000}
