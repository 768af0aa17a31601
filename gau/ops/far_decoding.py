"""Exact attention to whole earlier chunks (`gau.ops.far_chunks`), decoded: a state, a block of tokens in, outputs out.

Rows and blocks are those of `gau.ops.decoding`: a row is one document without gaps, so all earlier chunks are whole.
Which of them a chunk reads is settled when the chunk before is complete, and stays until its own is. The states, for
one head:

    one chunk    far_k [B, 2 C, S]: the chunk before and the current one; far_v [B, C, E]: the chunk before. The values
                 of the current one are in the state of mixed chunk attention
    R > 1        far_k [B, G C, S], far_v [B, G C, E]: every token so far, of at most G chunks;
                 far_mean [B, G, S]: the mean key of each complete chunk, float32 (float64);
                 far_query [B, S]: the sum of the queries of the current chunk, float32 (float64);
                 far_index [B, R]: the chunks that the current chunk reads, int32. Of g complete ones the first
                 min(R, g) places count

All are zeros at the start of a sequence; what stands in them beyond a row's position is never read. For single tokens
of R > 1 `gau.ops.kernels.decode_chunks` is the fast path.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks
from gau.ops.decoding import DecodePosition, State, with_places
from gau.ops.far_chunks import best_chunks, far_weights
from gau.ops.masks import clear_padding


def with_chunks(state: State, chunks: int, size: int) -> State:
    """Returns a state of R > 1 with room for so many chunks of this size; its arrays may have more axes before."""
    places = {'far_k': chunks * size, 'far_v': chunks * size, 'far_mean': chunks}
    return state | {name: with_places(state[name], n) for name, n in places.items()}


def chunk_before_block(
    q_BTS: Array,
    k_BTS: Array,
    v_BTE: Array,
    own_BCE: Array,
    state: State,
    *,
    position: DecodePosition,
) -> tuple[Array, State]:
    """Decodes a block whose tokens read one chunk, the one before theirs; the state has one size.

    Args:
      q_BTS: queries.
      k_BTS: keys.
      v_BTE: values.
      own_BCE: values of the current chunk, before the block.
      state: `far_k` and `far_v` (module docstring).
      position: where the tokens stand.

    Returns:
      Outputs [B, T, E] in the dtype of v, zeros in the first chunk, meaningless at padding; and the new state.
    """
    t, size = v_BTE.shape[1], own_BCE.shape[1]
    offset_B, chunk_B = position.start_B % size, position.start_B // size
    if t == 1:
        rows_B = jnp.arange(len(offset_B))
        place_B = jnp.where(position.length_B > 0, size + offset_B, 2 * size)
        k_BMS = state['far_k'].at[rows_B, place_B].set(k_BTS[:, 0], mode='drop')
        before_BCS = k_BMS[:, :size]
        k_BCS = _with_means(before_BCS, _means(before_BCS))
        found_B1 = jnp.broadcast_to((chunk_B > 0)[:, None, None], (len(chunk_B), 1, size))
        o_BTE = _read(q_BTS[:, None], k_BCS[:, None], state['far_v'][:, None], found_B1)[:, 0]
        full_B11 = (offset_B + position.length_B == size)[:, None, None]

        def moved(k_BMS, before_BCE):
            complete_BCE = own_BCE.at[:, -1].set(v_BTE[:, 0])
            return (
                jnp.where(full_B11, jnp.roll(k_BMS, -size, axis=1), k_BMS),
                jnp.where(full_B11, complete_BCE, before_BCE),
            )

        k_BMS, before_BCE = jax.lax.cond(full_B11.any(), moved, lambda *x: x, k_BMS, state['far_v'])
        return o_BTE, {'far_k': k_BMS, 'far_v': before_BCE}
    # The chunk before, the current one and the block, laid end to end.
    whole_v_BME = jnp.concatenate([state['far_v'], own_BCE], axis=1)
    whole_k, whole_v = (
        _laid_out(old, new, size + offset_B, position, size)
        for old, new in ((state['far_k'], k_BTS), (whole_v_BME, v_BTE))
    )
    k_BGCS, v_BGCE = into_chunks(whole_k, size)[:, :-1], into_chunks(whole_v, size)[:, :-1]
    k_BGCS = _with_means(k_BGCS, _means(k_BGCS))
    chunks = k_BGCS.shape[1]
    q_BGCS = into_chunks(_laid_out(None, q_BTS, offset_B, position, size), size)
    found_BG1 = (chunk_B[:, None] + jnp.arange(chunks) > 0)[..., None]
    o_BGCE = _read(q_BGCS, k_BGCS, v_BGCE, jnp.broadcast_to(found_BG1, (*found_BG1.shape[:2], size)))
    first_B = (offset_B + position.length_B) // size * size
    state = {'far_k': _cut(whole_k, first_B, 2 * size), 'far_v': _cut(whole_v, first_B, size)}
    return _cut(o_BGCE.reshape(len(first_B), -1, v_BTE.shape[-1]), offset_B, t), state


def chosen_chunks_block(
    q_BTS: Array, k_BTS: Array, v_BTE: Array, state: State, *, position: DecodePosition
) -> tuple[Array, State]:
    """Decodes a block whose tokens read several chunks; keys and values of all tokens are the state.

    A token beyond the last place of the state has output NaN, so that an overrun is noticed.

    Args:
      q_BTS: queries.
      k_BTS: keys.
      v_BTE: values.
      state: the arrays of R > 1 (module docstring).
      position: where the tokens stand.

    Returns:
      Outputs [B, T, E] in the dtype of v, zeros in the first chunk, meaningless at padding; and the new state.
    """
    (batch, t, _), groups = v_BTE.shape, state['far_mean'].shape[1]
    size = state['far_k'].shape[1] // groups
    offset_B, chunk_B = position.start_B % size, position.start_B // size
    positions_BT, rows_B1 = position.positions_BT(t), jnp.arange(batch)[:, None]
    places_BT = jnp.where(position.real_BT(t) > 0, positions_BT, groups * size)

    k_BMS, v_BME = (
        state[name].at[rows_B1, places_BT].set(x_BTS, mode='drop')
        for name, x_BTS in (('far_k', k_BTS), ('far_v', v_BTE))
    )
    k_BGCS, v_BGCE = into_chunks(k_BMS, size), into_chunks(v_BME, size)
    # Of the chunks that have tokens of the block all but the last may be completed by it; the one after each of these
    # begins with a choice. A single token completes one or none.
    ends = -(-t // size)
    end_BJ = chunk_B[:, None] + jnp.arange(ends)
    complete_BJ = (end_BJ + 1) * size <= (position.start_B + position.length_B)[:, None]
    q_BNS = _laid_out(None, q_BTS, offset_B, position, size) if t > 1 else clear_padding(q_BTS, position.real_BT(1))
    q_BJCS = into_chunks(q_BNS, size if t > 1 else 1)
    sums_BJS = q_BJCS.sum(2, dtype=state['far_query'].dtype)
    sums_BJS = sums_BJS.at[:, 0].add(jnp.where(offset_B[:, None] > 0, state['far_query'], 0))
    ended_BJ = jnp.where(complete_BJ, end_BJ, groups)

    def chosen(means_BJS, index_BJR):
        """Returns the means of complete chunks, and what the chunks after them read."""
        means_BJS = _means(_take(k_BGCS, jnp.minimum(end_BJ, groups - 1)))
        mean_BGS = state['far_mean'].at[rows_B1, ended_BJ].set(means_BJS, mode='drop')
        fit_BJG = jnp.einsum('BJS,BGS->BJG', sums_BJS[:, :ends] / size, mean_BGS)
        place_G, end_BJ1 = jnp.arange(groups), end_BJ[..., None]
        best_BJr, _ = best_chunks(fit_BJG, place_G == end_BJ1, place_G <= end_BJ1, index_BJR.shape[-1])
        missing = index_BJR.shape[-1] - best_BJr.shape[-1]
        return means_BJS, jnp.pad(best_BJr, ((0, 0), (0, 0), (0, missing))).astype(index_BJR.dtype)

    index_B1R = state['far_index'][:, None]
    nothing = jnp.zeros_like(sums_BJS[:, :ends]), jnp.repeat(index_B1R, ends, axis=1)
    means_BJS, next_BJR = jax.lax.cond(complete_BJ.any(), chosen, lambda *x: x, *nothing)
    mean_BGS = state['far_mean'].at[rows_B1, ended_BJ].set(means_BJS, mode='drop')
    index_BJR = jnp.concatenate([index_B1R, next_BJR], axis=1)
    # How many chunks the block completed says which of the choices the state keeps, and which sum of queries.
    last_B11 = complete_BJ.sum(1)[:, None, None]
    new = {'far_k': k_BMS, 'far_v': v_BME, 'far_mean': mean_BGS}
    new['far_index'] = jnp.take_along_axis(index_BJR, last_B11, axis=1)[:, 0]
    # After a single token that completes a chunk, the sum is that of a chunk without tokens.
    sums_BJS = jnp.pad(sums_BJS, ((0, 0), (0, ends + 1 - sums_BJS.shape[1]), (0, 0)))
    new['far_query'] = jnp.take_along_axis(sums_BJS, last_B11, axis=1)[:, 0]

    # A state of fewer chunks than may be read has no more of them.
    index_BJr = index_BJR[:, : q_BJCS.shape[1], : min(index_BJR.shape[-1], groups)]
    begun_BJ1 = (chunk_B[:, None] + jnp.arange(index_BJr.shape[1]))[..., None]
    found_BJr = jnp.arange(index_BJr.shape[-1]) < begun_BJ1

    def taken(x_BGCS):
        x_BJrCS = _take(x_BGCS, index_BJr)
        return x_BJrCS.reshape(*x_BJrCS.shape[:2], -1, x_BJrCS.shape[-1])

    keys_BJMS = _with_means(_take(k_BGCS, index_BJr), _take(mean_BGS, index_BJr))
    keys_BJMS = keys_BJMS.reshape(*keys_BJMS.shape[:2], -1, keys_BJMS.shape[-1])
    o_BJCE = _read(q_BJCS, keys_BJMS, taken(v_BGCE), jnp.repeat(found_BJr, size, axis=-1))
    o_BTE = _cut(o_BJCE.reshape(batch, -1, v_BTE.shape[-1]), offset_B if t > 1 else jnp.zeros_like(offset_B), t)
    return jnp.where((positions_BT < groups * size)[..., None], o_BTE, jnp.nan), new


def chosen_chunks_token(
    q_B1S: Array, k_B1S: Array, v_B1E: Array, window: State, *, position: DecodePosition
) -> tuple[Array, State]:
    """Decodes one token of each row in a window (`gau.ops.chunk_window`) as `chosen_chunks_block` does.

    Args:
      q_B1S: queries.
      k_B1S: keys.
      v_B1E: values.
      window: the arrays of R > 1, of which `far_index` is what the chunk reads in which the window was opened; and
        `far_next`, what the one after it reads, once it is complete.
      position: where the tokens stand, and where the window was opened.
    """
    size = window['far_k'].shape[1] // window['far_mean'].shape[1]
    opened_B1, start_B1 = (x_B[:, None] // size for x_B in (position.opened_B, position.start_B))
    index_BR = jnp.where(start_B1 > opened_B1, window['far_next'], window['far_index'])
    state = {name: x for name, x in window.items() if name != 'far_next'} | {'far_index': index_BR}
    o_B1E, state = chosen_chunks_block(q_B1S, k_B1S, v_B1E, state, position=position)
    end_B1 = (position.start_B + position.length_B)[:, None] // size
    next_BR = jnp.where(end_B1 > opened_B1, state['far_index'], window['far_next'])
    return o_B1E, state | {'far_index': window['far_index'], 'far_next': next_BR}


def _means(k_CS: Array) -> Array:
    """Returns the mean key of each chunk [..., C, S], in float32 (float64)."""
    return k_CS.mean(-2, dtype=jnp.promote_types(k_CS.dtype, jnp.float32))


def _with_means(k_CS: Array, mean_S: Array) -> Array:
    """Returns the keys of each chunk [..., C, S] with its mean added to each, as `far_chunks` scores them."""
    return (k_CS + mean_S[..., None, :]).astype(k_CS.dtype)


def _read(q_BJCS: Array, k_BJMS: Array, v_BJME: Array, found_BJM: Array) -> Array:
    """Returns what the queries of every chunk read of the keys and values that are there, [B, J, C, E]."""
    dtype = jnp.promote_types(q_BJCS.dtype, jnp.float32)
    scores_BJCM = jnp.einsum('BJCS,BJMS->BJCM', q_BJCS, k_BJMS, preferred_element_type=dtype)
    return far_weights(scores_BJCM, found_BJM[:, :, None], q_BJCS.shape[-1]).astype(v_BJME.dtype) @ v_BJME


def _take(x_BG: Array, index_B: Array) -> Array:
    """Returns the chunks of these indices [B, ...], each with what it has, [B, ..., C, S]."""
    return jax.vmap(lambda x_G, index: x_G.at[index].get(mode='promise_in_bounds'))(x_BG, index_B)


def _laid_out(old_BMS: Array | None, new_BTS: Array, first_B: Array, position: DecodePosition, size: int) -> Array:
    """Returns what is there [B, M, S] and the block behind place `first` of it, in whole chunks; zeros elsewhere."""
    t, old = new_BTS.shape[1], 0 if old_BMS is None else old_BMS.shape[1]
    # One chunk more than the block fills: it begins somewhere inside the current one.
    places = max(old, size) + -(-t // size) * size
    x_BNS = jnp.zeros((len(new_BTS), places, new_BTS.shape[-1]), new_BTS.dtype)
    if old_BMS is not None:
        x_BNS = x_BNS.at[:, :old].set(old_BMS)
    x_BNS = jax.vmap(lambda x, y, first: jax.lax.dynamic_update_slice_in_dim(x, y, first, 0))(x_BNS, new_BTS, first_B)
    place_N = jnp.arange(places)
    least_B = first_B - (position.start_B if old else 0)
    real_BN = (place_N < (first_B + position.length_B)[:, None]) & (place_N >= least_B[:, None])
    return clear_padding(x_BNS, real_BN)


def _cut(x_BNS: Array, first_B: Array, n: int) -> Array:
    """Returns n places of every row from a first one on."""
    return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, n, 0))(x_BNS, first_B)
