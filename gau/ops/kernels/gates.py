"""Values of gated attention, and the gradient of its gate, on a GPU: what FLASH and FLASH-Quad have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import GATES, cdiv


def launch_over_tiles(
    kernel: Any,
    p_BNW: Array,
    bias_2E: Array,
    *more: Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    overwrite: Mapping[int, int] | None = None,
    spans: bool = False,
    **constants: Any,
) -> list[Array]:
    """Runs kernel(p, bias, *more, *outputs) on tiles of [N, E]; see `launch`.

    A program has one tile, grid [E, N, B]; with `spans`, for kernels with sums over tokens, `GATES.span` tokens, grid
    [E times N, B].
    """
    batch, n, stride = p_BNW.shape
    width = bias_2E.shape[1]
    across = cdiv(width, GATES.block_e)
    if spans:
        grid = across * cdiv(n, GATES.span), batch
        constants |= {'SPAN': GATES.span, 'STAGES': GATES.num_stages}
    else:
        grid = across, cdiv(n, GATES.block_n), batch
    return launch(
        kernel,
        p_BNW,
        bias_2E,
        *more,
        outputs=outputs,
        grid=grid,
        num_warps=GATES.num_warps,
        num_stages=GATES.num_stages,
        overwrite=overwrite,
        N=n,
        E=width,
        W=stride,
        BLOCK_N=GATES.block_n,
        BLOCK_E=GATES.block_e,
        **constants,
    )


def values(p_BNW: Array, bias_2E: Array, *, tokens_first: bool) -> Array:
    """Returns silu(p + bias) of the second E columns, [B, N, E], or [N, B, E] if `tokens_first`."""
    from gau.ops.kernels.gates_triton import values_kernel

    (batch, n, _), width = p_BNW.shape, bias_2E.shape[1]
    like_v = jax.ShapeDtypeStruct((n, batch, width) if tokens_first else (batch, n, width), p_BNW.dtype)
    fields = {'B': batch, 'TOKENS_FIRST': tokens_first}
    return launch_over_tiles(values_kernel, p_BNW, bias_2E, outputs=[like_v], **fields)[0]


def gate_gradients(
    p_BNW: Array, bias_2E: Array, do_BNE: Array, o_BNE: Array, *, tokens_first: bool, row_sums: bool = False
) -> tuple[Array, ...]:
    """Returns the gradients of p, of the gate's bias and of x, for o = silu(u) x with u = p + bias.

    Args:
      p_BNW: projections of the gate in the first E columns.
      bias_2E: bias of gate and values.
      do_BNE: gradient of o.
      o_BNE: o itself; u of 0 is taken for 1e-20 (`gates_triton.nonzero_gate`).
      tokens_first: whether the gradient of x is to be [N, B, E].
      row_sums: whether to return also the gradient of x times x, summed over the columns.

    Returns:
      [B, N, W], of which the gate's columns alone are written; float32 [E]; [B, N, E] or [N, B, E]; if `row_sums`,
      float32 [B, N].
    """
    from gau.ops.kernels.gates_triton import gate_gradient_kernel

    batch, n, width = o_BNE.shape
    spans, across = cdiv(n, GATES.span), cdiv(width, GATES.block_e)
    shape = (n, batch, width) if tokens_first else o_BNE.shape
    dp_BNW, dx, dbias, sums = launch_over_tiles(
        gate_gradient_kernel,
        p_BNW,
        bias_2E,
        do_BNE,
        o_BNE,
        outputs=[
            jax.ShapeDtypeStruct(p_BNW.shape, p_BNW.dtype),
            jax.ShapeDtypeStruct(shape, o_BNE.dtype),
            jax.ShapeDtypeStruct((batch * spans, width), jnp.float32),
            jax.ShapeDtypeStruct((across, batch, n) if row_sums else (1,), jnp.float32),
        ],
        spans=True,
        B=batch,
        TOKENS_FIRST=tokens_first,
        ROW_SUMS=row_sums,
    )
    return (dp_BNW, dbias.sum(0), dx, *([sums.sum(0)] if row_sums else []))
