"""ScaleNorm on a GPU: its gradient in one pass over the residual stream, where the compiler makes three."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two
from gau.ops.norms import NORM_EPSILON, scale_norm

# Numbers in a program's registers: a few rows of the stream.
BLOCK = 4096


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def stream_and_scale_norm(x_BND: Array, g: Array, dtype: str) -> tuple[Array, Array, Array]:
    """Returns x, and x / rms(x) * g in `dtype` twice, for two readers: their gradients come back together.

    Args:
      x_BND: the residual stream, which goes on as it is besides being normalised.
      g: the scalar scale, float32.
      dtype: of the result.
    """
    y_BND = scale_norm(x_BND, g, dtype=dtype)
    return x_BND, y_BND, y_BND


def _forward(x_BND, g, dtype):
    return stream_and_scale_norm(x_BND, g, dtype), (x_BND, g)


def _backward(dtype, residuals, gradients):
    from gau.ops.kernels.norm_triton import scale_norm_gradient_kernel

    del dtype
    x_BND, g = residuals
    rows, width = x_BND.size // x_BND.shape[-1], x_BND.shape[-1]
    block_d = power_of_two(width)
    block_r = max(1, BLOCK // block_d)
    programs = -(-rows // block_r)
    dx_BND, dg = launch(
        scale_norm_gradient_kernel,
        x_BND,
        g,
        *gradients,
        outputs=[jax.ShapeDtypeStruct(x_BND.shape, x_BND.dtype), jax.ShapeDtypeStruct((programs,), jnp.float32)],
        grid=(programs,),
        num_warps=4,
        num_stages=1,
        ROWS=rows,
        D=width,
        EPSILON=NORM_EPSILON,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
    )
    return dx_BND, dg.sum().astype(g.dtype)


stream_and_scale_norm.defvjp(_forward, _backward)
