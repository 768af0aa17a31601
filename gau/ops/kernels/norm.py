"""ScaleNorm of the residual stream on a GPU: one pass forwards, one backwards.

The compiler makes three kernels for the norm's gradient, and one for that of the biases, a sum over all tokens. That
sum and the one for the scale come as in `gau.ops.kernels.queries_keys`: a bounded number of programs walks over the
rows, each with its sums in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two
from gau.ops.norms import NORM_EPSILON

# Numbers in a program's tile: a few rows of the stream, forwards and backwards.
BLOCK, GRADIENT_BLOCK = 4096, 2048
# Programs of the backward pass at most: five for each multiprocessor of an H100, as many as its registers hold at once
# at a width of 768 in bfloat16.
PROGRAMS = 660


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scale_norm_of_stream(x_BND: Array, bias_D: Array | None, g: Array, dtype: str) -> tuple[Array, Array]:
    """Returns x, and s / rms(s) * g for s = x + bias, [B, N, D] both (`gau.ops.norms` has the formula).

    x is returned to go on with: its gradient is then that of both results, added up in the same pass.

    Args:
      x_BND: the residual stream without its biases, bfloat16 or float32.
      bias_D: their sum, float32; or None.
      g: the scalar scale, float32.
      dtype: of the second result.
    """
    return _forward(x_BND, bias_D, g, dtype)[0]


def _forward(x_BND, bias_D, g, dtype):
    from gau.ops.kernels.norm_triton import scale_norm_kernel

    x_RD, fields = _as_rows(x_BND, bias_D, BLOCK)
    (h_RD,) = launch(
        scale_norm_kernel,
        x_RD,
        g if bias_D is None else bias_D,
        g,
        outputs=[jax.ShapeDtypeStruct(x_RD.shape, dtype)],
        grid=(-(-len(x_RD) // fields['BLOCK_R']),),
        num_warps=4,
        num_stages=1,
        **fields,
    )
    return (x_BND, h_RD.reshape(x_BND.shape)), (x_BND, bias_D, g)


def _backward(dtype, residuals, gradients):
    from gau.ops.kernels.norm_triton import scale_norm_gradient_kernel

    del dtype
    x_BND, bias_D, g = residuals
    x_RD, fields = _as_rows(x_BND, bias_D, GRADIENT_BLOCK)
    programs = min(-(-len(x_RD) // fields['BLOCK_R']), PROGRAMS)
    width = 1 if bias_D is None else 1 + bias_D.size
    dx_RD, sums = launch(
        scale_norm_gradient_kernel,
        x_RD,
        g if bias_D is None else bias_D,
        g,
        *(gradient.reshape(x_RD.shape) for gradient in gradients),
        outputs=[
            jax.ShapeDtypeStruct(x_RD.shape, x_RD.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ],
        grid=(programs,),
        num_warps=4,
        num_stages=1,
        **fields,
    )
    dx_BND, sums = dx_RD.reshape(x_BND.shape), sums.sum(0)
    return dx_BND, None if bias_D is None else sums[:-1].astype(bias_D.dtype), sums[-1].astype(g.dtype)


scale_norm_of_stream.defvjp(_forward, _backward)


def _as_rows(x: Array, bias_D: Array | None, block: int) -> tuple[Array, dict[str, Any]]:
    """Returns x as rows [R, D], and the constants of both kernels for tiles of about `block` numbers."""
    width = x.shape[-1]
    x_RD, block_d = x.reshape(-1, width), power_of_two(width)
    fields = {'BIAS': bias_D is not None, 'ROWS': len(x_RD), 'D': width, 'EPSILON': NORM_EPSILON}
    return x_RD, fields | {'BLOCK_R': max(1, block // block_d), 'BLOCK_D': block_d}
