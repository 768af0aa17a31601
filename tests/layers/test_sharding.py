"""Attention on parts of a sequence equals attention on all of it (see sharded_attention.py)."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize('cases', ['few', pytest.param('every', marks=pytest.mark.slow)])
def test_sharded_tokens_give_the_same_values_and_gradients(cases):
    done = subprocess.run(
        [sys.executable, '-m', 'tests.layers.sharded_attention', cases],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == {'few': 4, 'every': 64}[cases]
    for case, difference in report.items():
        assert difference < 1e-11, case
