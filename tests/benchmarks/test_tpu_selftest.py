"""scripts/tpu_selftest.py on a CPU: the same program, tiny, in the interpreter."""

import pytest

from gau.benchmarks import tpu_selftest
from tests.training.test_commands import run


@pytest.mark.slow
def test_without_a_tpu_it_runs_tiny_in_the_interpreter():
    code, out, err = run('scripts/tpu_selftest.py')
    assert code == 0, err
    shown, block = out.split('To paste into an issue:\n\n```\n')
    assert block == shown.strip() + '\n```\n'
    lines = shown.strip().splitlines()
    assert lines[1] == 'no TPU: tiny, in the interpreter'
    assert lines[-1] == 'all right'
    # Two types, causal or not, splash, FLASH-Quad and FLASH with two functions, and with a gate and with a window
    # of two chunks where it is causal; models by XLA and by their kernels.
    assert sum(line.endswith(' right') and 'gradients' in line for line in lines) == 20
    assert [line.split()[:2] for line in lines if 'tokens/s' in line] == [
        ['flash', 'xla'], ['flash', 'pallas'], ['flash_quad', 'xla'], ['flash_quad', 'pallas'],
        ['transformer_plus_plus', 'xla'], ['transformer_plus_plus', 'splash'],
    ]  # fmt: skip


@pytest.mark.slow
def test_a_wrong_kernel_is_found(monkeypatch):
    monkeypatch.setenv('GAU_PALLAS_INTERPRET', '1')
    sizes = tpu_selftest.TINY._replace(tokens=20, chunk=8)
    splash = tpu_selftest.splash_attention
    assert next(tpu_selftest.check_kernels(sizes)).right
    monkeypatch.setattr(tpu_selftest, 'splash_attention', lambda *args, **fields: splash(*args, **fields) * 1.01)
    assert not next(tpu_selftest.check_kernels(sizes)).right


@pytest.mark.parametrize(('dtype', 'value', 'gradient', 'right'), [
    ('float32', 1e-6, 1e-5, True),
    ('float32', 1e-6, 2e-3, False),
    ('bfloat16', 1e-2, 1e-2, True),
    ('bfloat16', 5e-2, 1e-2, False),
])  # fmt: skip
def test_what_is_right(dtype, value, gradient, right):
    assert tpu_selftest.Check('kernel', dtype, value, gradient).right == right
