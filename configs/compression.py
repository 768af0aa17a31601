"""What a trained FLASH loses when it is made smaller, what a short run brings back, and what a teacher gives.

    python scripts/sweep.py --config=configs/compression.py --config.seed=0 --sweep=trained --workdir=runs/seed_0
    python scripts/compress.py --workdir=runs/seed_0/flash --output=runs/seed_0/rounded --method=rounded
    python scripts/compress.py --workdir=runs/seed_0/flash --output=runs/seed_0/narrower --method=narrower \
        --expansion_factor=1.5
    python scripts/compress.py --workdir=runs/seed_0/flash --output=runs/seed_0/half --method=sparser --pattern=0.5
    python scripts/compress.py --workdir=runs/seed_0/flash --output=runs/seed_0/two_of_four --method=sparser \
        --pattern=2:4
    python eval.py --workdir=runs/seed_0/half
    python eval.py --workdir=runs/seed_0/flash --config.quantization=int8 --config.model.impl=xla
    python scripts/sweep.py --config=configs/compression.py:steps=150 --config.seed=0 \
        --sweep=recovered:runs/seed_0+quantised:runs/seed_0 --workdir=runs/recovered_0
    python scripts/sweep.py --config=configs/compression.py:steps=1200 --sweep=teacher --workdir=runs/teacher
    python scripts/sweep.py --config=configs/compression.py:steps=400 --sweep=students,seed:3 --workdir=runs/students
    python scripts/sweep.py --config=configs/compression.py:steps=400 --sweep=distilled:runs/teacher/base,seed:3 \
        --workdir=runs/distilled

Questions: how much loss does `small` gain by weights and activations of 8 bits, by E = 1.5 D in place of 2 D, and by
losing half of its weights or two of every four? At once, and after 150 steps of recovery (for 8 bits: of training with
them)? Are `small` and `tiny` better students of `base` than of the text alone, at equal tokens?

Arguments: those of configs/quality.py, whose training this is, and steps (1,000). Each seed has directories of its own,
so that the starts of `recovered` have the same names for all seeds and the report can take them together. The teacher
and all students have half the batch, 32,768 tokens: so few tokens are worth more in more steps.

Cost: seven minutes of two NVIDIA H200 for three seeds of all of it, several runs at once.

Result: docs/results/compression.md. 8 bits cost 0.03 %, the rest less than 2 % after 150 steps; a teacher is worth 0.25
nats to `small`.
"""

from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from configs import common, quality
from configs.paper import budgets
from gau.experiments.sweep import Overrides

RATE = 'optimizer.learning_rate'
TEACHER = 'distillation.teacher'
# A recovery starts again at less than a quarter of the rate of training; not tuned.
RECOVERY = {RATE: 1e-3, 'optimizer.warmup_percent': 10.0}
SPARSE = {**RECOVERY, 'optimizer.keep_zeros': ('kernel$',)}
# qwix sees no kernels of our own.
XLA = {'model.impl': 'xla'}
BATCH = {'data.batch_size': 32}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for `--config=configs/compression.py:arg`."""
    arg = common.parse_arg(arg, model='flash', size='small', context=1024, data=budgets.DATA['small'], steps=1000)
    given = [f'{name}={arg[name]}' for name in arg.given if name != 'steps']
    config = quality.get_config(','.join(given))
    config.optimizer.learning_rate = 4.5e-3
    config.checkpoint.keep_last = 1
    if 'steps' in arg.given or not arg.runlocal:
        config.steps = arg.steps
    return config


def sweep_trained() -> Iterator[Overrides]:
    """What is made smaller."""
    yield {'name': 'flash'}


def sweep_recovered(directory: str) -> Iterator[Overrides]:
    """The model as it was trained, for comparison, and those made smaller, which lie beside it, trained on."""
    source = Path(directory).absolute()
    yield {'name': 'flash', 'init_from': str(source / 'flash'), **RECOVERY}
    yield {'name': 'narrower', 'init_from': str(source / 'narrower'), 'model.expansion_factor': 1.5, **RECOVERY}
    for pattern in ('half', 'two_of_four'):
        yield {'name': pattern, 'init_from': str(source / pattern), **SPARSE}


def sweep_quantised(directory: str) -> Iterator[Overrides]:
    """The model as it was trained, trained on in 8 bits: weights and activations, and weights alone."""
    for quantization in ('int8', 'int8_weights'):
        start = {'init_from': str(Path(directory).absolute() / 'flash'), **RECOVERY}
        yield {'name': quantization, 'quantization': quantization, **XLA, **start}


def sweep_quantised_from_nothing() -> Iterator[Overrides]:
    """Training in 8 bits from the start."""
    yield {'name': 'int8_from_nothing', 'quantization': 'int8', **XLA}


def sweep_narrow() -> Iterator[Overrides]:
    """E = 1.5 D from the start."""
    yield {'name': 'narrow', 'model.expansion_factor': 1.5}


def sweep_teacher() -> Iterator[Overrides]:
    """112 M parameters."""
    yield {'name': 'base', ':size': 'base', RATE: 3e-3, **BATCH}


def sweep_students() -> Iterator[Overrides]:
    """Both students without a teacher."""
    for size in ('tiny', 'small'):
        yield {'name': size, ':size': size, **BATCH}


def sweep_distilled(teacher: str) -> Iterator[Overrides]:
    """Both with one, half of the loss being its divergence."""
    for size in ('tiny', 'small'):
        yield {'name': size, ':size': size, TEACHER: str(Path(teacher).absolute()), **BATCH}
