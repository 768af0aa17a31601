"""Settings of every test: CPU only unless JAX_PLATFORMS is set, and one compilation cache, which subprocesses share."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tests marked for a GPU name the platforms themselves: JAX_PLATFORMS=cuda,cpu.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# A directory of this run's own: a test must never pass because of what an older checkout compiled.
os.environ['GAU_COMPILATION_CACHE'] = tempfile.mkdtemp(prefix='gau_tests_xla_')
