"""Scans over the chunks of a sequence on a GPU: the states M that chunks read, and the gradient of what they add to M.

A kernel goes through the chunks with the state in registers. A long sequence alone has too few of such programs for a
GPU, so it is cut into parts that are scanned side by side, each from a state of zeros; what the earlier parts hand on
is added to the states afterwards. (The kernels that read the states could add it, but then fewer of their programs fit
on an SM: LOG.md, L17.)

Letters beside those of `gau.ops`: F = J S, the states of all directions one below the other; X parts of a sequence; K,
J or F, the factors with which the scans carry their states on over a chunk, one for each scan or one for each row.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import ScanTiles, cdiv, fit, power_of_two


def values_and_states(
    p_BGCW: Array, bias_2E: Array, k_BGCF: Array, carry_mask_BGK: Array, state_scale_BGJ: Array
) -> tuple[Array, Array]:
    """Returns v = silu(p + bias) of the second E columns, [B, G, C, E], and state_scale M, [B, G, F, E]."""
    from gau.ops.kernels.gated_chunks_triton import states_kernel

    width, (*chunks, stride) = bias_2E.shape[1], p_BGCW.shape
    like_v = jax.ShapeDtypeStruct((*chunks, width), p_BGCW.dtype)
    inputs, tiles = (p_BGCW, bias_2E, k_BGCF), tile_sizes.STATES[str(k_BGCF.dtype)]
    fields = {'carry_mask_BGK': carry_mask_BGK, 'state_scale_BGJ': state_scale_BGJ, 'outputs': [like_v], 'W': stride}
    v_BGCE, m_BGFE, totals_BXFE = _scan(states_kernel, tiles, k_BGCF, width, inputs, **fields)
    if totals_BXFE is not None:
        carried_BGFE = _carried_between_parts(
            totals_BXFE, carry_mask_BGK, state_scale_BGJ.shape[-1], against_states=False
        )
        state = k_BGCF.shape[-1] // state_scale_BGJ.shape[-1]
        carried_BGFE *= jnp.repeat(state_scale_BGJ, state, axis=-1)[..., None]
        m_BGFE = (m_BGFE.astype(jnp.float32) + carried_BGFE).astype(m_BGFE.dtype)
    return v_BGCE, m_BGFE


def gradient_of_added(
    q_BGCF: Array, dmixed_BGCE: Array, carry_mask_BGK: Array, state_scale_BGJ: Array, *, window: int = 1
) -> Array:
    """Returns the gradient of k^T v, of what each chunk adds to the states, [B, G, F, E].

    In a window of two it holds anything in the last two chunks, where it is zeros.

    Args:
      q_BGCF: queries of the states.
      dmixed_BGCE: gradient of q state_scale M.
      carry_mask_BGK: factor by which a scan carries its state, or a row of it, on over a chunk: 1, a decay, or 0 where
        it drops it.
      state_scale_BGJ: factor on the state that a chunk reads, not 0.
      window: 1; or 2, where a chunk reads the state, scale included, of the chunk before. One direction.
    """
    from gau.ops.kernels.gated_chunks_triton import states_gradient_kernel

    inputs, tiles = (q_BGCF, dmixed_BGCE), tile_sizes.STATES_GRADIENT[str(q_BGCF.dtype)]
    fields = {'carry_mask_BGK': carry_mask_BGK, 'state_scale_BGJ': state_scale_BGJ, 'WINDOW': window}
    dkv_BGFE, totals_BXFE = _scan(states_gradient_kernel, tiles, q_BGCF, dmixed_BGCE.shape[-1], inputs, **fields)
    if totals_BXFE is not None:
        carried_BGFE = _carried_between_parts(
            totals_BXFE, carry_mask_BGK, state_scale_BGJ.shape[-1], against_states=True
        )
        dkv_BGFE = (dkv_BGFE.astype(jnp.float32) + carried_BGFE).astype(dkv_BGFE.dtype)
    return dkv_BGFE


def _scan(
    kernel: Any,
    tiles: ScanTiles,
    like_BGCF: Array,
    width: int,
    inputs: Sequence[Array],
    *,
    carry_mask_BGK: Array,
    state_scale_BGJ: Array,
    outputs: Sequence[jax.ShapeDtypeStruct] = (),
    **constants: int,
) -> list[Array | None]:
    """Launches kernel(*inputs, carry_mask, state_scale, *outputs, states [B, G, F, E], totals [B, X, F, E]).

    Returns:
      The outputs, the states, and the totals at the ends of the parts; None where there is only one part.
    """
    (batch, groups, size, inner), directions = like_BGCF.shape, state_scale_BGJ.shape[-1]
    state = inner // directions
    tiles = fit(tiles, block_c=size, block_e=width)
    across = cdiv(width, tiles.block_e)
    warps_of_a_part = batch * directions * across * tiles.num_warps
    length = cdiv(groups, min(cdiv(tiles.min_warps, warps_of_a_part), groups))
    parts = cdiv(groups, length)
    states = jax.ShapeDtypeStruct((batch, groups, inner, width), like_BGCF.dtype)
    totals = jax.ShapeDtypeStruct((batch, parts, inner, width) if parts > 1 else (1,), jnp.float32)
    *results, totals = launch(
        kernel,
        *(*inputs, carry_mask_BGK, state_scale_BGJ),
        outputs=[*outputs, states, totals],
        grid=(across, parts, batch * directions),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        G=groups,
        C=size,
        S=state,
        F=inner,
        E=width,
        L=carry_mask_BGK.shape[-1] // directions,
        PARTS=parts,
        PRECISION='ieee',
        BLOCK_C=tiles.block_c,
        BLOCK_S=power_of_two(state),
        BLOCK_E=tiles.block_e,
        **constants,
    )
    return [*results, totals if parts > 1 else None]


def _carried_between_parts(
    totals_BXFE: Array, carry_mask_BGK: Array, directions: int, *, against_states: bool
) -> Array:
    """Returns what reaches each chunk from the parts scanned before its own, float32 [B, G, F, E].

    Args:
      totals_BXFE: the state at the end of each part. Of the reverse direction part 0 has the last chunks.
      carry_mask_BGK: see `gradient_of_added`.
      directions: J.
      against_states: whether the kernel went against the direction of the states.
    """
    (batch, parts, inner, width), (_, groups, _) = totals_BXFE.shape, carry_mask_BGK.shape
    length = cdiv(groups, parts)
    # L factors for each scan.
    steps_BGJL = _in_order_of_scan(carry_mask_BGK.reshape(batch, groups, directions, -1))
    padding = ((0, 0), (0, parts * length - groups), (0, 0), (0, 0))
    mask_BXgJL = jnp.pad(steps_BGJL, padding, constant_values=1).reshape(batch, parts, length, directions, -1)
    # From one part to a later one, [B, later, earlier, J, L]: the factors of all parts between them.
    x = jnp.arange(parts)
    between_XXX = (x[:, None, None] > x) & (x > x[:, None])
    passes_BXXJL = jnp.where(between_XXX[..., None, None], mask_BXgJL.prod(2)[:, None, None], 1).prod(3)
    passes_BXXJL *= (x[:, None] > x)[..., None, None]
    # And within the later part no chunk before the one that is reached; after it, against the direction of the states.
    flip = jnp.flip if against_states else lambda x, _: x
    reached_BXgJL = flip(jnp.cumprod(flip(mask_BXgJL, 2), axis=2), 2)
    shift, first = (-1, -1) if against_states else (1, 0)
    reached_BXgJL = jnp.roll(reached_BXgJL, shift, axis=2).at[:, :, first].set(1)
    if against_states:
        passes_BXXJL = passes_BXXJL.swapaxes(1, 2)
    totals_BXJLsE = totals_BXFE.reshape(batch, parts, directions, mask_BXgJL.shape[-1], -1, width)
    # No einsum: parts are few, and a library's matmul of so few rows in float32 takes twice to four times as long.
    carry_BXJLsE = jnp.sum(passes_BXXJL[..., None, None] * totals_BXJLsE[:, None], axis=2)
    carried_BXgJLsE = reached_BXgJL[..., None, None] * carry_BXJLsE[:, :, None]
    carried_BGJLsE = carried_BXgJLsE.reshape(batch, -1, *carry_BXJLsE.shape[2:])[:, :groups]
    return _in_order_of_scan(carried_BGJLsE).reshape(batch, groups, inner, width)


def _in_order_of_scan(x_BGJ: Array) -> Array:
    """Reverses the chunks of the second direction: from their order in the sequence to that of its scan, and back."""
    return jnp.stack([x_BGJ[:, :: -1 if j else 1, j] for j in range(x_BGJ.shape[2])], axis=2)
