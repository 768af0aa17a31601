"""A block of a prompt in FLASH's kernels, the state carried on: `gau.ops.decoding.mixed_chunk_block` and the gate.

The kernels are those of training (`gau.ops.kernels.gated_chunks`), whose scan begins with the state.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks
from gau.ops.decoding import DecodePosition, State, scale_of_state
from gau.ops.gated_states import log_decays
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
    gate_BTL: Array | None = None,
) -> tuple[Array, State]:
    """Returns silu(u) * mixed_chunk_block(..., silu(v)) for [u, v] = p + bias, [B, T, E], and the new state.

    Args:
      p_BTW: projections of gate and values in the first 2 E columns, finite at padding.
      bias_2E: their bias.
      q_BTS: and k_BTS, q_lin_BTS, k_lin_BTS: of both branches.
      state: `v`, `k`, `k_lin` and `sum` of one head (`gau.ops.decoding`); with a gate `gate` and `count`.
      position: where the tokens stand; rows that take tokens begin a chunk with the first.
      spec: chunk size and so on, causal, both branches.
      bias_P: relative bias by distance inside a chunk, [2 C - 1], or None.
      gate_BTL: logits of a gate of the state, float32, or None.
    """
    size, t, dtype = spec.chunk_size, p_BTW.shape[1], p_BTW.dtype
    q, k, q_lin, k_lin = (into_chunks(x, size) for x in (q_BTS, k_BTS, q_lin_BTS, k_lin_BTS))
    # Padding stands after all that is read, and no token sees a later one: no ids to compare.
    a_BGCC = weights_in_chunks(q, k, bias_P, None, spec, 'triton')
    g, complete_B = jnp.arange(q.shape[1]), position.length_B // size
    chunks = {'k': k, 'k_lin': k_lin}
    if gate_BTL is None:
        log_BGL = jnp.full((*q.shape[:2], 1), math.log(spec.global_decay), jnp.float32)
        scale_BGL = scale_of_state((position.start_B // size)[:, None] + g, spec, jnp.float32)[..., None]
    else:
        chunks['gate'] = into_chunks(gate_BTL, size)
        log_BGL = log_decays(gate_BTL, None, size)
        scale_BGL = _scale_with_gate(log_BGL, state['count'], size, mean=spec.mean)
    if log_BGL.shape[-1] > 1:
        # Of rows of the state: of the queries' columns.
        q_lin, scale_BGL = (q_lin.astype(jnp.float32) * scale_BGL[:, :, None]).astype(dtype), jnp.ones_like(scale_BGL)
    o_BGCE, v_BGCE = gated_chunk_matmul_from_state(
        *(into_chunks(p_BTW, size), bias_2E, a_BGCC, q_lin, k_lin.astype(dtype)),
        *(jnp.exp(log_BGL), scale_BGL[..., :1], state['sum']),
    )
    chunks['v'] = v_BGCE

    # Weights of each chunk's tokens, and of the sum, after the last complete chunk.
    is_complete_BG1 = (g < complete_B[:, None])[..., None]
    log_BGL = jnp.where(is_complete_BG1, log_BGL, 0)
    weight_BGL = jnp.where(is_complete_BG1, jnp.exp(log_BGL[:, ::-1].cumsum(1)[:, ::-1] - log_BGL), 0)
    reached_BL = jnp.exp(log_BGL.sum(1))
    added_BSE = jnp.einsum(
        'BGCS,BGCE->BSE', k_lin * weight_BGL[:, :, None].astype(dtype), v_BGCE, preferred_element_type=jnp.float32
    )
    totals = {'sum': reached_BL[..., None] * state['sum'] + added_BSE}
    if gate_BTL is not None:
        totals['count'] = reached_BL * state['count'] + size * weight_BGL.sum(1)
    # Of a block that ends with a chunk any chunk will do: nothing of it is read.
    current_B111 = jnp.minimum(complete_B, len(g) - 1)[:, None, None, None]
    takes_B11 = (position.length_B > 0)[:, None, None]
    new = {
        name: jnp.where(takes_B11, jnp.take_along_axis(x, current_B111, axis=1)[:, 0], state[name])
        for name, x in chunks.items()
    }
    return o_BGCE.reshape(o_BGCE.shape[0], -1, o_BGCE.shape[-1])[:, :t], new | totals


def _scale_with_gate(log_decay_BGL: Array, count_BL: Array, size: int, *, mean: bool) -> Array:
    """Returns the factors on the states that chunks read, which make means of sums."""
    if not mean:
        return jnp.ones_like(log_decay_BGL)

    def after(first, then):
        return first[0] * then[0], first[1] * then[0] + then[1]

    decay_BGL = jnp.exp(log_decay_BGL)
    reached_BGL, added_BGL = jax.lax.associative_scan(after, (decay_BGL, jnp.full_like(decay_BGL, size)), axis=1)
    after_BGL = reached_BGL * count_BL[:, None] + added_BGL
    before_BGL = jnp.concatenate([count_BL[:, None], after_BGL[:, :-1]], axis=1)
    return 1 / jnp.where(before_BGL > 0, before_BGL, 1)
