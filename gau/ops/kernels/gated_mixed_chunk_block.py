"""A block of a prompt in FLASH's kernels, the state carried on: `gau.ops.decoding.mixed_chunk_block` and the gate.

The kernels are those of training (`gau.ops.kernels.gated_chunks`), whose scan begins with the state.
"""

import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks
from gau.ops.decoding import DecodePosition, State, scale_of_state
from gau.ops.kernels.gated_chunks import gated_chunk_matmul_from_state
from gau.ops.kernels.gated_mixed_chunk import weights_in_chunks
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.tracing import traced_once


@traced_once('spec')
def gated_mixed_chunk_block(
    p_BTW: Array,
    bias_2E: Array,
    q_BTS: Array,
    k_BTS: Array,
    q_lin_BTS: Array,
    k_lin_BTS: Array,
    state: State,
    *,
    position: DecodePosition,
    spec: ChunkSpec,
    bias_P: Array | None = None,
) -> tuple[Array, State]:
    """Returns silu(u) * mixed_chunk_block(..., silu(v)) for [u, v] = p + bias, [B, T, E], and the new state.

    Args:
      p_BTW: projections of gate and values in the first 2 E columns, finite at padding.
      bias_2E: their bias.
      q_BTS: and k_BTS, q_lin_BTS, k_lin_BTS: of both branches.
      state: `v`, `k`, `k_lin` and `sum` of one head (`gau.ops.decoding`).
      position: where the tokens stand; rows that take tokens begin a chunk with the first.
      spec: chunk size and so on, causal, both branches.
      bias_P: relative bias by distance inside a chunk, [2 C - 1], or None.
    """
    size, t, dtype = spec.chunk_size, p_BTW.shape[1], p_BTW.dtype
    q, k, q_lin, k_lin = (into_chunks(x, size) for x in (q_BTS, k_BTS, q_lin_BTS, k_lin_BTS))
    # Padding stands after all that is read, and no token sees a later one: no ids to compare.
    a_BGCC = weights_in_chunks(q, k, bias_P, None, spec, 'triton')
    g, decay = jnp.arange(q.shape[1]), spec.global_decay
    scale_BG = scale_of_state((position.start_B // size)[:, None] + g, spec, jnp.float32)
    carry_BG = jnp.full(scale_BG.shape, decay, jnp.float32)
    scans = carry_BG[..., None], scale_BG[..., None]
    o_BGCE, v_BGCE = gated_chunk_matmul_from_state(
        *(into_chunks(p_BTW, size), bias_2E, a_BGCC, q_lin, k_lin.astype(dtype)), *scans, state['sum']
    )

    complete_B = position.length_B // size
    last_BG = complete_B[:, None] - 1 - g
    weight_BG = jnp.where(last_BG >= 0, decay ** jnp.maximum(last_BG, 0).astype(jnp.float32), 0)
    added_BSE = jnp.einsum(
        'BGCS,BGCE->BSE',
        k_lin * weight_BG[..., None, None].astype(dtype),
        v_BGCE,
        preferred_element_type=jnp.float32,
    )
    total_BSE = decay ** complete_B[:, None, None].astype(jnp.float32) * state['sum'] + added_BSE
    # Of a block that ends with a chunk any chunk will do: nothing of it is read.
    current_B111 = jnp.minimum(complete_B, len(g) - 1)[:, None, None, None]
    takes_B11 = (position.length_B > 0)[:, None, None]
    new = {
        name: jnp.where(takes_B11, jnp.take_along_axis(x, current_B111, axis=1)[:, 0], state[name])
        for name, x in (('k', k), ('k_lin', k_lin), ('v', v_BGCE))
    }
    return o_BGCE.reshape(o_BGCE.shape[0], -1, o_BGCE.shape[-1])[:, :t], new | {'sum': total_BSE}
