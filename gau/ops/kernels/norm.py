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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def scale_norm_of_residual(
    x_BND: Array, bias_D: Array | None, g: Array, gate_D: Array | None, dtype: str
) -> tuple[Array, Array, Array | None]:
    """Returns x; h = s / rms(s) * g for s = x + bias, [B, N, D] both (`gau.ops.norms`); h.gate, float32 [B, N, 1].

    Whoever reads x afterwards takes it from here: the gradients of all results are then added in the same pass.

    Args:
      x_BND: the residual stream without its biases, bfloat16 or float32.
      bias_D: their sum, float32; or None.
      g: the scalar scale, float32.
      gate_D: weights of the logit of a gate that reads h, in the type of h; or None, and there is no third result.
      dtype: of the second result.
    """
    return _forward(x_BND, bias_D, g, gate_D, dtype)[0]


def _forward(x_BND, bias_D, g, gate_D, dtype):
    from gau.ops.kernels.norm_triton import scale_norm_kernel

    tiles = tile_sizes.NORM
    x_ND, fields = _as_rows(x_BND, bias_D, gate_D, tiles)
    h_ND, logit_N = launch(
        scale_norm_kernel,
        *_operands(x_ND, bias_D, g, gate_D),
        outputs=[
            jax.ShapeDtypeStruct(x_ND.shape, dtype),
            jax.ShapeDtypeStruct((1 if gate_D is None else len(x_ND),), jnp.float32),
        ],
        grid=(cdiv(len(x_ND), fields['BLOCK_R']),),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **fields,
    )
    logit_BN1 = None if gate_D is None else logit_N.reshape(*x_BND.shape[:-1], 1)
    return (x_BND, h_ND.reshape(x_BND.shape), logit_BN1), (x_BND, bias_D, g, gate_D)


def _backward(dtype, residuals, gradients):
    from gau.ops.kernels.norm_triton import scale_norm_gradient_kernel

    del dtype
    (x_BND, bias_D, g, gate_D), (dresidual_BND, dh_BND, dlogit_BN1) = residuals, gradients
    tiles = tile_sizes.NORM_GRADIENT if gate_D is None else tile_sizes.NORM_GRADIENT_GATE
    x_ND, fields = _as_rows(x_BND, bias_D, gate_D, tiles)
    programs = min(cdiv(len(x_ND), fields['BLOCK_R']), tiles.max_programs)
    widths = [0 if vector is None else vector.size for vector in (bias_D, gate_D)]
    dx_ND, sums = launch(
        scale_norm_gradient_kernel,
        *_operands(x_ND, bias_D, g, gate_D),
        *(gradient.reshape(x_ND.shape) for gradient in (dresidual_BND, dh_BND)),
        g if dlogit_BN1 is None else dlogit_BN1.reshape(-1),
        outputs=[
            jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype),
            jax.ShapeDtypeStruct((programs, sum(widths) + 1), jnp.float32),
        ],
        grid=(programs,),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **fields,
    )
    dbias_D, dgate_D, (dg,) = jnp.split(sums.sum(0), [widths[0], sum(widths)])
    vectors = ((bias_D, dbias_D), (gate_D, dgate_D))
    dbias_D, dgate_D = (None if vector is None else dvector.astype(vector.dtype) for vector, dvector in vectors)
    return dx_ND.reshape(x_BND.shape), dbias_D, dg.astype(g.dtype), dgate_D


scale_norm_of_residual.defvjp(_forward, _backward)


def _operands(x_ND: Array, bias_D: Array | None, g: Array, gate_D: Array | None) -> list[Array]:
    """Returns what both kernels read first; g stands for what is None, and is not read there."""
    return [x_ND, g if bias_D is None else bias_D, g, g if gate_D is None else gate_D]


def _as_rows(
    x: Array, bias_D: Array | None, gate_D: Array | None, tiles: RowTiles | RowSumTiles
) -> tuple[Array, dict[str, Any]]:
    """Returns x as rows [N, D] of all tokens, and the constants of both kernels."""
    width = x.shape[-1]
    x_ND, block_d = x.reshape(-1, width), power_of_two(width)
    fields = {'BIAS': bias_D is not None, 'GATE': gate_D is not None, 'ROWS': len(x_ND), 'D': width}
    return x_ND, fields | {'EPSILON': NORM_EPSILON, 'BLOCK_R': rows_of(tiles, block_d), 'BLOCK_D': block_d}
