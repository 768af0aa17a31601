"""The interpreter runs what a compiler may refuse: kernels are compiled for a GPU that need not be there."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def test_decoding_kernels_and_scans_with_a_gate_compile_for_an_h100():
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'tests.ops.kernels.compile_for_cuda'],
        cwd=ROOT,
        env=environment | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    wanted = {f'decode_{name}_kernel' for name in ('projections', 'attention', 'output', 'cache')}
    wanted |= {'add_parts_kernel', 'states_kernel', 'states_gradient_kernel'}
    assert wanted <= compiled
