"""What is asked of a GPU before a kernel is."""

import jax
import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir

from gau.ops.kernels.compat import FFI_CALL, use_ffi_call
from gau.ops.kernels.launch import launch
from gau.ops.kernels.norm_triton import scale_norm_kernel


def test_a_grid_that_no_gpu_takes_is_refused():
    with pytest.raises(ValueError, match=r'grid of \(1, 65536\).* larger chunks'):
        launch(
            scale_norm_kernel,
            outputs=[jax.ShapeDtypeStruct((1,), 'float32')],
            grid=(1, 65_536),
            num_warps=4,
            num_stages=1,
        )


def test_a_constant_that_a_kernel_does_not_have_is_refused():
    """Triton's interpreter would let it pass."""
    fields = {'outputs': [jax.ShapeDtypeStruct((1,), 'float32')], 'grid': (1,), 'num_warps': 4, 'num_stages': 1}
    with pytest.raises(ValueError, match='scale_norm_kernel has no BLOCK_N'):
        launch(scale_norm_kernel, **fields, BLOCK_N=16)


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
