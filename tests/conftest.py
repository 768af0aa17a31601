"""Settings of every test: CPU only, and one compilation cache for the run, which subprocesses share."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ['JAX_PLATFORMS'] = 'cpu'
# A directory of this run's own: a test must never pass because of what an older checkout compiled.
os.environ['GAU_COMPILATION_CACHE'] = tempfile.mkdtemp(prefix='gau_tests_xla_')
