"""Scans over the chunks of a sequence on a GPU: the states M that chunks read, and the gradient of what they add to M.

A kernel goes through the chunks with the state in registers. A long sequence alone has too few of such programs for a
GPU, so it is cut into parts that are scanned side by side, each from a state of zeros; what the earlier parts hand on
is added to the states afterwards. (The kernels that read the states could add it, but then fewer of their programs fit
on an SM: LOG.md, L17.)

Letters beside those of `gau.ops`: F = J S, the states of all directions one below the other; X parts of a sequence.
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
    p_BGCW: Array, bias_2E: Array, k_BGCF: Array, carry_mask_BGJ: Array, state_scale_BGJ: Array
) -> tuple[Array, Array]:
    """Returns v = silu(p + bias) of the second E columns, [B, G, C, E], and state_scale M, [B, G, F, E]."""
    from gau.ops.kernels.gated_chunks_triton import states_kernel

    width, (*chunks, stride) = bias_2E.shape[1], p_BGCW.shape
    like_v = jax.ShapeDtypeStruct((*chunks, width), p_BGCW.dtype)
    inputs, tiles = (p_BGCW, bias_2E, k_BGCF), tile_sizes.STATES[str(k_BGCF.dtype)]
    fields = {'carry_mask_BGJ': carry_mask_BGJ, 'state_scale_BGJ': state_scale_BGJ, 'outputs': [like_v], 'W': stride}
    v_BGCE, m_BGFE, totals_BXFE = _scan(states_kernel, tiles, k_BGCF, width, inputs, **fields)
    if totals_BXFE is not None:
        carried_BGFE = _carried_between_parts(totals_BXFE, carry_mask_BGJ, against_states=False)
        state = k_BGCF.shape[-1] // state_scale_BGJ.shape[-1]
        carried_BGFE *= jnp.repeat(state_scale_BGJ, state, axis=-1)[..., None]
        m_BGFE = (m_BGFE.astype(jnp.float32) + carried_BGFE).astype(m_BGFE.dtype)
    return v_BGCE, m_BGFE


def gradient_of_added(
    q_BGCF: Array, dmixed_BGCE: Array, carry_mask_BGJ: Array, state_scale_BGJ: Array, *, window: int = 1
) -> Array:
    """Returns the gradient of k^T v, of what each chunk adds to the states, [B, G, F, E].

    In a window of two it holds anything in the last two chunks, where it is zeros.

    Args:
      q_BGCF: queries of the states.
      dmixed_BGCE: gradient of q state_scale M.
      carry_mask_BGJ: factor by which a scan carries its state on over a chunk: 1, what a gate keeps, or 0 where it
        drops it.
      state_scale_BGJ: factor on the state that a chunk reads, not 0.
      window: 1; or 2, where a chunk reads the state, scale included, of the chunk before. One direction.
    """
    from gau.ops.kernels.gated_chunks_triton import states_gradient_kernel

    inputs, tiles = (q_BGCF, dmixed_BGCE), tile_sizes.STATES_GRADIENT[str(q_BGCF.dtype)]
    fields = {'carry_mask_BGJ': carry_mask_BGJ, 'state_scale_BGJ': state_scale_BGJ, 'WINDOW': window}
    dkv_BGFE, totals_BXFE = _scan(states_gradient_kernel, tiles, q_BGCF, dmixed_BGCE.shape[-1], inputs, **fields)
    if totals_BXFE is not None:
        carried_BGFE = _carried_between_parts(totals_BXFE, carry_mask_BGJ, against_states=True)
        dkv_BGFE = (dkv_BGFE.astype(jnp.float32) + carried_BGFE).astype(dkv_BGFE.dtype)
    return dkv_BGFE


def _scan(
    kernel: Any,
    tiles: ScanTiles,
    like_BGCF: Array,
    width: int,
    inputs: Sequence[Array],
    *,
    carry_mask_BGJ: Array,
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
        *(*inputs, carry_mask_BGJ, state_scale_BGJ),
        outputs=[*outputs, states, totals],
        grid=(across, parts, batch * directions),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        G=groups,
        C=size,
        S=state,
        F=inner,
        E=width,
        PARTS=parts,
        PRECISION='ieee',
        BLOCK_C=tiles.block_c,
        BLOCK_S=power_of_two(state),
        BLOCK_E=tiles.block_e,
        **constants,
    )
    return [*results, totals if parts > 1 else None]


def _carried_between_parts(totals_BXFE: Array, carry_mask_BGJ: Array, *, against_states: bool) -> Array:
    """Returns what reaches each chunk from the parts scanned before its own, float32 [B, G, F, E].

    Args:
      totals_BXFE: the state at the end of each part. Of the reverse direction part 0 has the last chunks.
      carry_mask_BGJ: see `gradient_of_added`.
      against_states: whether the kernel went against the direction of the states.
    """
    (batch, parts, inner, width), (_, groups, directions) = totals_BXFE.shape, carry_mask_BGJ.shape
    length = cdiv(groups, parts)
    padding = ((0, 0), (0, parts * length - groups), (0, 0))
    mask_BGJ = jnp.pad(_in_order_of_scan(carry_mask_BGJ), padding, constant_values=1)
    mask_BXgJ = mask_BGJ.reshape(batch, parts, length, directions)
    # From one part to a later one, [B, later, earlier, J]: the factors of all parts between them.
    x = jnp.arange(parts)
    between_XXX = (x[:, None, None] > x) & (x > x[:, None])
    passes_BXXJ = jnp.where(between_XXX[..., None], mask_BXgJ.prod(2)[:, None, None], 1).prod(3)
    passes_BXXJ *= (x[:, None] > x)[..., None]
    # And within the later part no chunk before the one that is reached; after it, against the direction of the states.
    flip = jnp.flip if against_states else lambda x, _: x
    reached_BXgJ = flip(jnp.cumprod(flip(mask_BXgJ, 2), axis=2), 2)
    shift, first = (-1, -1) if against_states else (1, 0)
    reached_BXgJ = jnp.roll(reached_BXgJ, shift, axis=2).at[:, :, first].set(1)
    if against_states:
        passes_BXXJ = passes_BXXJ.swapaxes(1, 2)
    totals_BXJSE = totals_BXFE.reshape(batch, parts, directions, -1, width)
    # No einsum: parts are few, and a library's matmul of so few rows in float32 takes twice to four times as long.
    carry_BXJSE = jnp.sum(passes_BXXJ[..., None, None] * totals_BXJSE[:, None], axis=2)
    carried_BXgJSE = reached_BXgJ[..., None, None] * carry_BXJSE[:, :, None]
    carried_BGJSE = carried_BXgJSE.reshape(batch, -1, *carry_BXJSE.shape[2:])[:, :groups]
    return _in_order_of_scan(carried_BGJSE).reshape(batch, groups, inner, width)


def _in_order_of_scan(x_BGJ: Array) -> Array:
    """Reverses the chunks of the second direction: from their order in the sequence to that of its scan, and back."""
    return jnp.stack([x_BGJ[:, :: -1 if j else 1, j] for j in range(x_BGJ.shape[2])], axis=2)
