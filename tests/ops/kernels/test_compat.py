"""Both lines of jax-triton are called by their own rules. Functions stand for the packages, which need a GPU."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir

from gau.ops.kernels import compat
from gau.ops.kernels.compat import FFI_CALL, use_ffi_call

# It adds x to y, in the buffer of y, and writes 2 x to z.
KERNEL = SimpleNamespace(arg_names=['x_ptr', 'unused_ptr', 'y_ptr', 'z_ptr', 'SIZE'])
LAUNCH, CONSTANTS = {'grid': (1,), 'num_warps': 4, 'num_stages': 1}, {'SIZE': 16}


def call_of_0_3(x, y, *, kernel, out_shape, input_output_aliases, enable_fp_fusion, **fields):
    """Takes a pointer for every input and output, and says by number which of them are one."""
    assert (len(out_shape), input_output_aliases, enable_fp_fusion) == (2, {1: 0}, True)
    assert (kernel, fields) == (KERNEL, LAUNCH | CONSTANTS)
    return [y + x, 2 * x]


def call_of_0_4(*, kernel, out_type, backend_options, x_ptr, unused_ptr, y_ptr, **fields):
    """Takes one pointer, a `Ref`, for what is overwritten, and makes the other outputs only."""
    assert (len(out_type), backend_options, unused_ptr) == (1, {'enable_fp_fusion': True}, 1)
    assert (kernel, fields) == (KERNEL, LAUNCH | CONSTANTS)
    y_ptr[...] = y_ptr[...] + x_ptr
    return [2 * x_ptr]


@pytest.mark.parametrize(('version', 'call'), [((0, 3, 1), call_of_0_3), ((0, 4, 1), call_of_0_4)])
@pytest.mark.parametrize('within', [lambda f: f, jax.jit, lambda f: jax.jit(jax.checkpoint(f))])
def test_an_output_takes_over_an_input(monkeypatch, version, call, within):
    monkeypatch.setattr(compat, '_jax_triton', lambda: SimpleNamespace(triton_call=call, __version_info__=version))

    def f(x, y):
        outputs = [jax.ShapeDtypeStruct((16,), 'float32')] * 2
        return compat.triton_call(KERNEL, [x, y], outputs, overwrite={1: 0}, constants=CONSTANTS, **LAUNCH)

    x, y = jnp.arange(16.0), jnp.ones(16)
    total, double = within(f)(x, y)
    np.testing.assert_array_equal(total, x + 1)
    np.testing.assert_array_equal(double, 2 * x)
    np.testing.assert_array_equal(y, 1)


@pytest.mark.parametrize('version', [2, 4])
def test_calls_of_the_older_interface_are_made_use_ffi_call(version):
    config = {2: '"contents"', 4: '{opaque = "contents"}'}[version]
    text = f"""
    func.func @f(%x: tensor<2xf32>) -> tensor<2xf32> {{
      %y = stablehlo.custom_call @kernel(%x) {{api_version = {version} : i32, backend_config = {config}}}
        : (tensor<2xf32>) -> tensor<2xf32>
      return %y : tensor<2xf32>
    }}"""
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        call = module.body.operations[0].regions[0].blocks[0].operations[0]
        use_ffi_call(call.operation)
        assert module.operation.verify()
        assert f'@{FFI_CALL if version == 2 else "kernel"}(' in str(call)
        assert 'api_version = 4' in str(call)
        assert 'backend_config = {opaque = "contents"}' in str(call)


def test_constants_in_kernels_do_not_call_cdiv():
    # In Triton 3.6 `tl.cdiv` of two constants is a tensor, and the kernel compiles with later versions only.
    kernels = sorted(Path(compat.__file__).parent.glob('*_triton.py'))
    assert len(kernels) > 5
    for path in kernels:
        assert not re.findall(r'tl\.constexpr = .*tl\.cdiv', path.read_text()), path.name
