"""Tests in a process of their own, for what is fixed when JAX starts, such as the number of devices."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT


def report(module: str, *arguments: Any) -> Any:
    """Runs `python -m MODULE ARGUMENTS` from the root; returns what it printed last, an object in JSON."""
    done = subprocess.run(
        [sys.executable, '-m', module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        # A guard against hanging, whatever else the machine does.
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
