"""A block of a prompt in FLASH's kernels, the state carried on: `gau.ops.decoding.mixed_chunk_block` and the gate.

The kernels are those of training (`gau.ops.kernels.gated_chunks`), whose scan begins with the state.
"""

import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks
from gau.ops.decoding import DecodePosition, State, chunks_in_sum, scale_of_state
from gau.ops.gated_states import log_decays, one_over_count
from gau.ops.kernels.gated_chunks import gated_chunk_matmul_from_state
from gau.ops.kernels.gated_mixed_chunk import weights_in_chunks
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.positions import bias_matrix
from gau.ops.quadratic_attention import gate_and_values
from gau.ops.recurrence import recurrence
from gau.ops.scores import attention_weights
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
    gate_BT1: Array | None = None,
) -> tuple[Array, State]:
    """Returns silu(u) * mixed_chunk_block(..., silu(v)) for [u, v] = p + bias, [B, T, E], and the new state.

    Args:
      p_BTW: projections of gate and values in the first 2 E columns, finite at padding.
      bias_2E: their bias.
      q_BTS: and k_BTS, q_lin_BTS, k_lin_BTS: of both branches.
      state: `v`, `k`, `k_lin` and `sum` of one head (`gau.ops.decoding`); with a gate `gate` and `count`.
      position: where the tokens stand; rows that take tokens begin a chunk with the first.
      spec: chunk size and so on, causal, both branches.
      bias_P: relative bias by distance in a window of W chunks, [2 W C - 1], or None.
      gate_BT1: logits of a gate of the state, float32, or None.
    """
    size, t, dtype, two = spec.chunk_size, p_BTW.shape[1], p_BTW.dtype, spec.window > 1
    if two and t <= size:
        # Two chunks at least: a chunk alone would not know that there is one before it.
        arrays = p_BTW, q_BTS, k_BTS, q_lin_BTS, k_lin_BTS, gate_BT1
        padded = [x if x is None else jnp.pad(x, ((0, 0), (0, 2 * size - t), (0, 0))) for x in arrays]
        p_BTW, q_BTS, k_BTS, q_lin_BTS, k_lin_BTS, gate_BT1 = padded
    p, q, k, q_lin, k_lin = (into_chunks(x, size) for x in (p_BTW, q_BTS, k_BTS, q_lin_BTS, k_lin_BTS))
    # Padding stands after all that is read, and no token sees a later one: no ids to compare.
    a_BGCM = weights_in_chunks(q, k, bias_P, None, spec, 'triton')
    g, chunks_B, complete_B = jnp.arange(q.shape[1]), position.start_B // size, position.length_B // size
    # What the first chunk finds summed up, and what is summed up before it.
    found = begun = {name: state[name] for name in ('sum', 'count') if name in state}
    if two:
        begun = _with_chunk_before(state, chunks_B, spec)
    chunks = {'k': k, 'k_lin': k_lin}
    if gate_BT1 is None:
        log_BG1 = jnp.zeros((*q.shape[:2], 1), jnp.float32)
        scale_BG1 = scale_of_state(chunks_B[:, None] + g, spec, jnp.float32)[..., None]
        found_scale_B1 = scale_of_state(chunks_in_sum(chunks_B, spec), spec, jnp.float32)[:, None]
    else:
        chunks['gate'] = into_chunks(gate_BT1, size)
        log_BG1 = log_decays(gate_BT1, None, size)
        scale_BG1 = _scale_with_gate(log_BG1, begun['count'], size, mean=spec.mean)
        found_scale_B1 = one_over_count(found['count'])
        found_scale_B1 = found_scale_B1 if spec.mean else jnp.ones_like(found_scale_B1)
    # Of the first two chunks, on what is summed up before the block.
    begun_scales_B21 = jnp.stack([found_scale_B1, scale_BG1[:, 0]], axis=1)
    q_lin_B2CS = (q_lin[:, :2].astype(jnp.float32) * begun_scales_B21[:, : len(g), None]).astype(dtype)
    if two:
        first_BCM = _weights_of_first_chunk(q[:, 0], k[:, 0], state, chunks_B, bias_P, spec)
        a_BGCM = a_BGCM.at[:, 0, :, size:].set(first_BCM[..., size:])
    o_BGCE, v_BGCE = gated_chunk_matmul_from_state(
        *(p, bias_2E, a_BGCM, q_lin, k_lin.astype(dtype)), *(jnp.exp(log_BG1), scale_BG1, begun['sum'])
    )
    chunks['v'] = v_BGCE
    if two:
        # For the kernel nothing is before the block: its first chunk has no chunk before it, and neither of the first
        # two a state.
        u_BME, _ = gate_and_values(p_BTW[:, : 2 * size], bias_2E)
        read_B2CE = q_lin_B2CS @ jnp.stack([found['sum'], begun['sum']], axis=1).astype(dtype)
        read_B2CE = read_B2CE.at[:, 0].add(first_BCM[..., :size] @ state['v'][:, :size])
        o_BGCE = o_BGCE.at[:, :2].add(u_BME.reshape(read_B2CE.shape) * read_B2CE)

    # Weights of each chunk's tokens, and of the sum, after the last chunk that leaves the window.
    leaves_BG1 = (g < complete_B[:, None] - (spec.window - 1))[..., None]
    log_BG1 = jnp.where(leaves_BG1, log_BG1, 0)
    weight_BG1 = jnp.where(leaves_BG1, jnp.exp(log_BG1[:, ::-1].cumsum(1)[:, ::-1] - log_BG1), 0)
    reached_B1 = jnp.exp(log_BG1.sum(1))
    added_BSE = jnp.einsum(
        'BGCS,BGCE->BSE', k_lin * weight_BG1[:, :, None].astype(dtype), v_BGCE, preferred_element_type=jnp.float32
    )
    new = {'sum': reached_B1[..., None] * begun['sum'] + added_BSE}
    if gate_BT1 is not None:
        new['count'] = reached_B1 * begun['count'] + size * weight_BG1.sum(1)
    if two:
        stays_B = complete_B == 0
        new = {name: jnp.where(stays_B.reshape(-1, *[1] * (x.ndim - 1)), found[name], x) for name, x in new.items()}
    takes_B11 = (position.length_B > 0)[:, None, None]
    for name, x_BGCS in chunks.items():
        # Of a block that ends with a chunk any chunk will do: nothing of it is read.
        last = [_chunk_at(x_BGCS, jnp.minimum(complete_B, len(g) - 1))]
        if two:
            before_BCS = _chunk_at(x_BGCS, jnp.maximum(complete_B - 1, 0))
            last.insert(0, jnp.where(stays_B[:, None, None], state[name][:, :size], before_BCS))
        new[name] = jnp.where(takes_B11, jnp.concatenate(last, axis=1), state[name])
    return o_BGCE.reshape(o_BGCE.shape[0], -1, o_BGCE.shape[-1])[:, :t], new


def _chunk_at(x_BGCS: Array, g_B: Array) -> Array:
    return jnp.take_along_axis(x_BGCS, g_B[:, None, None, None], axis=1)[:, 0]


def _with_chunk_before(state: State, chunks_B: Array, spec: ChunkSpec) -> State:
    """Returns sum and count with the chunk before the current one, which a state for a window of two has beside it."""
    size, exists_B1 = spec.chunk_size, (chunks_B > 0)[:, None]
    k_BCS = jnp.where(exists_B1[..., None], state['k_lin'][:, :size], 0)
    kv_BSE = jnp.einsum('BCS,BCE->BSE', k_BCS, state['v'][:, :size], preferred_element_type=jnp.float32)
    if 'gate' not in state:
        return {'sum': state['sum'] + kv_BSE}
    kept_B1 = jnp.exp(log_decays(state['gate'][:, :size], None, size)[:, 0])
    return {
        'sum': kept_B1[..., None] * state['sum'] + kv_BSE,
        'count': kept_B1 * state['count'] + jnp.where(exists_B1, size, 0),
    }


def _weights_of_first_chunk(q_BCS, k_BCS, state: State, chunks_B: Array, bias_P, spec: ChunkSpec) -> Array:
    """Returns the weights of a block's first chunk on the chunk before it and on itself, [B, C, 2 C]."""
    size = spec.chunk_size
    exists_BM = (chunks_B > 0)[:, None] | (jnp.arange(2 * size) >= size)
    mask_BCM = jnp.tril(jnp.ones((size, 2 * size), bool), size) & exists_BM[:, None]
    bias_CM = None if bias_P is None else bias_matrix(bias_P, size, 2 * size, first=size)
    k_BMS = jnp.concatenate([state['k'][:, :size].astype(k_BCS.dtype), k_BCS], axis=1)
    fields = {'scoring': spec.scoring, 'sequence_length': 2 * size, 'mask': mask_BCM, 'bias': bias_CM}
    return attention_weights(q_BCS, k_BMS, **fields).astype(q_BCS.dtype)


def _scale_with_gate(log_decay_BG1: Array, count_B1: Array, size: int, *, mean: bool) -> Array:
    """Returns the factors on the states that chunks read, which make means of sums."""
    if not mean:
        return jnp.ones_like(log_decay_BG1)

    decay_BG1 = jnp.exp(log_decay_BG1)
    added_BG1 = jnp.full_like(decay_BG1, size).at[:, 0].add(decay_BG1[:, 0] * count_B1)
    after_BG1 = recurrence(decay_BG1, added_BG1)
    before_BG1 = jnp.concatenate([count_B1[:, None], after_BG1[:, :-1]], axis=1)
    return one_over_count(before_BG1)
