"""The losses of 20 `:runlocal` steps of every model, as they were at commit e74d9a2, and how they are computed again.

    JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 python -m tests.training.golden

writes losses.json anew, from the repository's root: only for a change that means to move the numbers, and says so.
"""

import json
import os
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from configs import lm, mlm
from gau.data import embedded, pipeline
from gau.models.architectures import ARCHITECTURES
from gau.training import config as training_config
from gau.training import mesh as meshes
from gau.training.batches import put_batch
from gau.training.setup import Run

PATH = Path(__file__).parent / 'losses.json'
PROGRAMS = {'lm': lm, 'mlm': mlm}
STEPS = 20
CASES = [
    (objective, name)
    for name, architecture in ARCHITECTURES.items()
    for objective in PROGRAMS
    if not (objective == 'lm' and architecture.not_causal)
]


def read() -> Mapping[str, Any]:
    """Returns losses.json: `environment`, `corpus`, and in `losses` by objective/model 20 floats each."""
    return json.loads(PATH.read_text())


def environment() -> dict[str, str]:
    """Returns everything that decides the last bits of a loss: versions, the CPU and how XLA compiles for it."""
    return {
        'python': platform.python_version(),
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'numpy': np.__version__,
        'cpu': _cpu(),
        # XLA divides sums over its threads.
        'cpus': str(os.cpu_count()),
        'JAX_DISABLE_MOST_OPTIMIZATIONS': os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS', '0'),
    }


def corpus() -> str:
    """Returns the fingerprint of the embedded corpus, which is that of Python's own files."""
    return embedded.identity()


def losses(objective: str, name: str) -> list[float]:
    """Trains `name` for 20 steps, by the real configs, data and step."""
    # What there was alone, but that FLASH-Quad's scores were divided by a fixed length.
    config = PROGRAMS[objective].get_config(f'model={name},recipe=paper,runlocal')
    if name == 'flash_quad':
        config.model.normalizer = None
    config = training_config.resolve(config)
    run = Run.from_config(config)
    state, train_step = run.init_state(), run.train_step()
    batches = pipeline.train_iterator(config.data, objective=objective, tokenizer=run.tokenizer, seed=config.seed)
    values = []
    with run.context():
        for _ in range(STEPS):
            state, metrics = train_step(state, put_batch(next(batches), meshes.batch_sharding(run.mesh)))
            values.append(float(metrics['loss']))
    return values


def _cpu() -> str:
    path = Path('/proc/cpuinfo')
    fields = [line.partition(':') for line in (path.read_text().splitlines() if path.exists() else ())]
    first = {name.strip(): value.strip() for name, _, value in fields[::-1]}
    # A virtual machine's name may hide the generation; the instructions that it offers do not.
    return f'{first.get("model name", platform.machine())}, {zlib.crc32(first.get("flags", "").encode()):08x}'
