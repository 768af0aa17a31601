"""Settings of every test: the platform, and a compilation cache that subprocesses share.

Tests run on a CPU, GPU kernels in Triton's interpreter. With GAU_TEST_PLATFORM=cuda the tests of kernels and of
cuDNN run on a GPU: `GAU_TEST_PLATFORM=cuda python -m pytest tests/ops/kernels tests/ops/test_cudnn_attention.py`.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PLATFORM = os.environ.get('GAU_TEST_PLATFORM', 'cpu')
if PLATFORM not in ('cpu', 'cuda'):
    raise ValueError(f'GAU_TEST_PLATFORM is cpu or cuda, not {PLATFORM}')
if PLATFORM == 'cpu':
    os.environ['JAX_PLATFORMS'] = 'cpu'
    # Triton looks at it when it is imported.
    os.environ['TRITON_INTERPRET'] = '1'
else:
    # Otherwise each worker of pytest-xdist reserves most of the GPU.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
# A directory of this process's own: a test must never pass because of what an older checkout compiled, nor read what
# another worker (pytest-xdist) is just writing.
_cache = tempfile.mkdtemp(prefix='gau_tests_xla_')
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ['GAU_COMPILATION_CACHE'] = _cache
# Tests compile much and run little: programs are optimised less, and kept however fast they were made. (Set to 0 to run
# the tests on what users run.)
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
if os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1':
    # A third less time to compile a model on a CPU, and less again where a small program is not cut into 32 modules,
    # one for each of many threads. (Golden losses are those of the default: tests/training/golden.)
    flags = '--xla_cpu_parallel_codegen_split_count=1'
    if version('jaxlib').startswith('0.10.'):
        # Later ones do not know it, and end a process that is given a flag that they do not know.
        flags += ' --xla_cpu_use_fusion_emitters=false'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
# Tracing makes many objects that live; looking through all of them every 700 takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """The directory of a finished run of `tests.training.tiny` with one layer: tests leave it as it is, or copy it."""
    from gau.training import loop
    from tests.training.tiny import tiny_config

    path = tmp_path_factory.mktemp('runs') / 'tiny'
    loop.train(tiny_config(model__num_layers=1), path)
    return path


@pytest.fixture(autouse=True)
def _registered_models():
    """Lets a test register models that the next one does not find (`gau.models.architectures`)."""
    from gau.models.architectures import ARCHITECTURES

    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


def pytest_collection_modifyitems(items):
    """Folders of long tests first: what comes last leaves no worker waiting for another (scripts/test.sh)."""
    items.sort(key=lambda item: item.path.parent.name not in ('training', 'experiments'))
