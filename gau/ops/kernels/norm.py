"""ScaleNorm of the residual stream on a GPU, with the sum before it: one pass forwards, one backwards.

The compiler makes a kernel for the sum and one for the norm, three for the norm's gradient, and one for that of the
bias, a sum over all tokens. That sum and the one for the scale come as in `gau.ops.kernels.queries_keys`: a bounded
number of programs walks over the rows, each with its sums in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two
from gau.ops.norms import NORM_EPSILON, scale_norm

# Numbers in a program's tile: a few rows of the stream, forwards and backwards.
BLOCK, GRADIENT_BLOCK = 4096, 2048
# Programs of the backward pass at most: as many as the registers of an H100 hold at once, five a multiprocessor (88 of
# them a thread, at a width of 768 in bfloat16).
PROGRAMS = 660


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def add_and_scale_norm(
    x_BND: Array, y_BND: Array | None, bias_D: Array | None, g: Array, dtype: str
) -> tuple[Array, Array]:
    """Returns s = x + y + bias and s / rms(s) * g, [B, N, D] both (`gau.ops.norms` has the formulas).

    The sum is made in float32 and rounded once, to the type of x; what is normalised is the rounded sum.

    Args:
      x_BND: the residual stream, bfloat16 or float32.
      y_BND: what a layer adds to it; or None: s is x.
      bias_D: the bias that y is without, float32; or None; None where y is.
      g: the scalar scale, float32.
      dtype: of the second result.
    """
    from gau.ops.kernels.norm_triton import add_and_scale_norm_kernel

    if y_BND is None:
        return x_BND, scale_norm(x_BND, g, dtype=dtype)
    rows, block_r, fields = _sizes(x_BND, bias_D, BLOCK)
    return tuple(
        launch(
            add_and_scale_norm_kernel,
            x_BND,
            y_BND,
            g if bias_D is None else bias_D,
            g,
            outputs=[jax.ShapeDtypeStruct(x_BND.shape, x_BND.dtype), jax.ShapeDtypeStruct(x_BND.shape, dtype)],
            grid=(-(-rows // block_r),),
            num_warps=4,
            num_stages=1,
            **fields,
        )
    )


def _forward(x_BND, y_BND, bias_D, g, dtype):
    s_BND, h_BND = add_and_scale_norm(x_BND, y_BND, bias_D, g, dtype)
    # Of y its type is all that is needed.
    like_y = None if y_BND is None else jnp.zeros((), y_BND.dtype)
    return (s_BND, h_BND), (s_BND, like_y, bias_D, g)


def _backward(dtype, residuals, gradients):
    from gau.ops.kernels.norm_triton import add_and_scale_norm_gradient_kernel

    del dtype
    s_BND, like_y, bias_D, g = residuals
    rows, block_r, fields = _sizes(s_BND, bias_D, GRADIENT_BLOCK)
    programs = min(-(-rows // block_r), PROGRAMS)
    width = 1 if bias_D is None else 1 + bias_D.size
    ds_BND, sums = launch(
        add_and_scale_norm_gradient_kernel,
        s_BND,
        g,
        *gradients,
        outputs=[
            jax.ShapeDtypeStruct(s_BND.shape, s_BND.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ],
        grid=(programs,),
        num_warps=4,
        num_stages=1,
        **fields,
    )
    sums = sums.sum(0)
    return (
        ds_BND,
        None if like_y is None else ds_BND.astype(like_y.dtype),
        None if bias_D is None else sums[:-1].astype(bias_D.dtype),
        sums[-1].astype(g.dtype),
    )


add_and_scale_norm.defvjp(_forward, _backward)


def _sizes(x: Array, bias_D: Array | None, block: int) -> tuple[int, int, dict[str, Any]]:
    """Returns the rows of x, how many of them a tile has, and the constants of both kernels."""
    rows, width = x.size // x.shape[-1], x.shape[-1]
    block_d = power_of_two(width)
    block_r = max(1, block // block_d)
    fields = {'BIAS': bias_D is not None, 'ROWS': rows, 'D': width, 'EPSILON': NORM_EPSILON}
    return rows, block_r, fields | {'BLOCK_R': block_r, 'BLOCK_D': block_d}
