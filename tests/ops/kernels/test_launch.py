"""What is asked of a GPU before a kernel is."""

import jax
import pytest

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
