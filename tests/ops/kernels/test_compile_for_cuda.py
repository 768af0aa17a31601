"""The interpreter runs what a compiler may refuse: kernels are compiled for a GPU that need not be there."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ('what', 'wanted'),
    [
        (
            'decode',
            [f'decode_{name}' for name in ('row', 'projections', 'attention', 'output', 'cache')],
        ),
        (
            'prefill',
            [
                *(f'prefill_{name}' for name in ('projections', 'attention', 'output')),
                *(f'prefill_{name}' for name in ('scales', 'roles', 'states', 'weights', 'mix')),
                *('queries_keys', 'queries_keys_gradient'),
            ],
        ),
        (
            'chunks',
            ['weights', 'states', 'output', 'states_gradient', 'value_and_weight_gradient', 'weights_gradient'],
        ),
        ('softmax', ['log_sums', 'weights', 'weights_gradient', 'gate_gradient']),
        (
            'far',
            [
                *('output', 'sum_over_read', 'scores_gradient', 'sum_over_readers', 'value_and_weight_gradient'),
                *(f'decode_{name}' for name in ('row', 'projections', 'far_attention', 'output')),
            ],
        ),
    ],
)
def test_kernels_compile_for_an_h100(what, wanted):
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'tests.ops.kernels.compile_for_cuda', what],
        cwd=ROOT,
        env=environment | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    # What an H100 has; newer compilers gave branches of their own to loops that had shared it.
    assert all(int(shared) <= 232_448 for _, _, shared, _, _ in lines), done.stdout
    compiled = {name for name, *_ in lines}
    if what == 'far':
        assert all(int(stack) == 0 for *_, stack in lines), done.stdout
    others = {'add_parts_kernel', 'states_kernel'} if what == 'decode' else set()
    assert {f'{name}_kernel' for name in wanted} | others <= compiled
