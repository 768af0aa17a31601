"""ScaleNorm of the residual stream on a GPU: one pass forwards, one backwards.

The compiler makes three kernels for the norm's gradient, and one more for that of the biases, a sum over all tokens.
Here that sum and the one for the scale are made as in `gau.ops.kernels.queries_keys`: a bounded number of programs goes
through the rows, each with its sums in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import RowSumTiles, RowTiles, cdiv, power_of_two, rows_of
from gau.ops.norms import NORM_EPSILON


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scale_norm_of_residual(x_BND: Array, bias_D: Array | None, g: Array, dtype: str) -> tuple[Array, Array]:
    """Returns x, and s / rms(s) * g for s = x + bias, [B, N, D] both (`gau.ops.norms` has the formula).

    Whoever reads x afterwards takes it from here: the gradients of both results are then added in the same pass.

    Args:
      x_BND: the residual stream without its biases, bfloat16 or float32.
      bias_D: their sum, float32; or None.
      g: the scalar scale, float32.
      dtype: of the second result.
    """
    return _forward(x_BND, bias_D, g, dtype)[0]


def _forward(x_BND, bias_D, g, dtype):
    from gau.ops.kernels.norm_triton import scale_norm_kernel

    tiles = tile_sizes.NORM
    x_ND, fields = _as_rows(x_BND, bias_D, tiles)
    (h_ND,) = launch(
        scale_norm_kernel,
        x_ND,
        g if bias_D is None else bias_D,
        g,
        outputs=[jax.ShapeDtypeStruct(x_ND.shape, dtype)],
        grid=(cdiv(len(x_ND), fields['BLOCK_R']),),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **fields,
    )
    return (x_BND, h_ND.reshape(x_BND.shape)), (x_BND, bias_D, g)


def _backward(dtype, residuals, gradients):
    from gau.ops.kernels.norm_triton import scale_norm_gradient_kernel

    del dtype
    x_BND, bias_D, g = residuals
    tiles = tile_sizes.NORM_GRADIENT
    x_ND, fields = _as_rows(x_BND, bias_D, tiles)
    programs = min(cdiv(len(x_ND), fields['BLOCK_R']), tiles.max_programs)
    width = 1 if bias_D is None else 1 + bias_D.size
    dx_ND, sums = launch(
        scale_norm_gradient_kernel,
        x_ND,
        g if bias_D is None else bias_D,
        g,
        *(gradient.reshape(x_ND.shape) for gradient in gradients),
        outputs=[
            jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ],
        grid=(programs,),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **fields,
    )
    dx_BND, sums = dx_ND.reshape(x_BND.shape), sums.sum(0)
    return dx_BND, None if bias_D is None else sums[:-1].astype(bias_D.dtype), sums[-1].astype(g.dtype)


scale_norm_of_residual.defvjp(_forward, _backward)


def _as_rows(x: Array, bias_D: Array | None, tiles: RowTiles | RowSumTiles) -> tuple[Array, dict[str, Any]]:
    """Returns x as rows [N, D] of all tokens, and the constants of both kernels."""
    width = x.shape[-1]
    x_ND, block_d = x.reshape(-1, width), power_of_two(width)
    fields = {'BIAS': bias_D is not None, 'ROWS': len(x_ND), 'D': width, 'EPSILON': NORM_EPSILON}
    return x_ND, fields | {'BLOCK_R': rows_of(tiles, block_d), 'BLOCK_D': block_d}
