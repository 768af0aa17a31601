"""Settings of every test: CPU only unless JAX_PLATFORMS is set, and a compilation cache that subprocesses share."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tests marked for a GPU name the platforms themselves: JAX_PLATFORMS=cuda,cpu.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# A directory of this process's own: a test must never pass because of what an older checkout compiled, nor read what
# another worker (pytest-xdist) is just writing.
_cache = tempfile.mkdtemp(prefix='gau_tests_xla_')
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ['GAU_COMPILATION_CACHE'] = _cache
# Tests compile much and run little: programs are optimised less, and kept however fast they were made. (Set to 0 to run
# the tests on what users run.)
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
