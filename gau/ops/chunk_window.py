"""Mixed chunk attention token by token in a window: the state of `gau.ops.decoding`, opened for the next few tokens.

A loop of single tokens would fold a full chunk into the sum at another step in every row: a branch in each step, and a
sum in float32 that is read, and may be written, each time. In a window nothing is folded. It has room for the current
chunk and T tokens more, T <= C, so that at most one chunk is completed in it:

    v [B, C + T, E]; k, k_lin [B, C + T, S]     the tokens from the start of the chunk that was current
    gate [B, C + T, 1]                          logits, where a gate decides what the sum keeps
    sum [B, S, E]                               as it was, in the compute type: only read
    count [B, 1]                                of a state with a gate, as it was
    arrivals [B]                                for the kernel that counts its programs (`kernels.decode_row`): zeros
    far_k, far_v, far_mean, far_query           of several far chunks, as they are in the state: written in place
    far_index, far_next [B, R]                  what the chunk that was current reads: only read; and what the next does

A token of the next chunk reads the chunks that its local branch does not read token by token, with the weights of the
global branch, which is what it would read from the sum. So steps are alike whatever the rows' places, without a branch;
`close_window` folds the chunks that were completed, once in T tokens. Where the local branch reads two chunks, all has
one chunk more, the one before the current.
"""

import jax.numpy as jnp
from jax import Array

from gau.ops.decoding import DecodePosition, State, chunks_in_sum, kept, over_count, weights_of_state
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import attention_weights

# Of a state's arrays, those with a row for each token.
BY_TOKEN = ('k', 'k_lin', 'v', 'gate')
# Of a window on a state with several far chunks, its arrays of them, which have no axis of heads.
FAR = ('far_k', 'far_v', 'far_mean', 'far_query', 'far_index', 'far_next')


def open_window(state: State, tokens: int) -> State:
    """Returns the window on a state for this many tokens; arrays may have further axes before the last two."""

    def opened(name, x):
        if name in BY_TOKEN:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, tokens), (0, 0)])
        return x.astype(state['v'].dtype) if name == 'sum' else x

    window = {name: opened(name, x) for name, x in state.items()}
    window['arrivals'] = jnp.zeros(state['v'].shape[:-2], jnp.int32)
    if 'far_index' in state:
        window['far_next'] = jnp.zeros_like(state['far_index'])
    return window


def close_window(
    state: State, window: State, *, start_B: Array, end_B: Array, chunk_size: int, chunks: int = 1
) -> State:
    """Returns the state after the tokens of a window.

    Args:
      state: what the window was opened on, [B, H, ...] or with one more axis before.
      window: its window, after tokens up to `end_B`.
      start_B: position of each row when it was opened.
      end_B: position now.
      chunk_size: C.
      chunks: that the local branch reads.
    """
    size = chunk_size
    full_B = end_B // size > start_B // size
    full_B111 = full_B[:, None, None, None]

    def last_chunks(x):
        current = x[..., : chunks * size, :]
        rest = jnp.zeros_like(current).at[..., : x.shape[-2] - size, :].set(x[..., size:, :])
        return jnp.where(full_B111, rest, current)

    closed = {name: last_chunks(x) for name, x in window.items() if name in BY_TOKEN}
    if 'far_index' in state:
        closed |= {name: window[name] for name in FAR if name in state}
        closed['far_index'] = jnp.where(full_B[:, None], window['far_next'], window['far_index'])
    if 'sum' in state:
        # The first chunk goes into the sum; there is none before the sequence.
        full_B111 &= (start_B // size >= chunks - 1)[:, None, None, None]
        total, k_lin = state['sum'], jnp.where(full_B111, window['k_lin'][..., :size, :], 0)
        added = jnp.einsum('...CS,...CE->...SE', k_lin, window['v'][..., :size, :], preferred_element_type=total.dtype)
        if 'gate' in state:
            kept_BH1 = jnp.where(full_B111[..., 0], kept(window['gate'][..., :size, :]), 1)
            total = kept_BH1[..., None] * total
            closed['count'] = kept_BH1 * state['count'] + jnp.where(full_B111[..., 0], size, 0)
        closed['sum'] = total + added
    return closed


def window_token(
    q_B1S: Array,
    k_B1S: Array,
    q_lin_B1S: Array,
    k_lin_B1S: Array,
    v_B1E: Array,
    window: State,
    *,
    position: DecodePosition,
    spec: ChunkSpec,
    gate_B11: Array | None = None,
    bias_B1M: Array | None = None,
) -> tuple[Array, State]:
    """Decodes one token of each row in a window; arguments and results are those of `gau.ops.decoding`'s blocks.

    `position.opened_B` says where the window was opened. A token that has no place in it would be dropped.
    """
    size, places = spec.chunk_size, window['v'].shape[1]
    place_B = position.start_B - position.opened_B // size * size + (spec.window - 1) * size
    rows_B = jnp.arange(place_B.shape[0])
    to_B = jnp.where(position.length_B > 0, place_B, places)
    new = {'k': k_B1S, 'k_lin': k_lin_B1S, 'v': v_B1E, 'gate': gate_B11}
    window = window | {
        name: window[name].at[rows_B, to_B].set(x[:, 0], mode='drop') for name, x in new.items() if name in window
    }
    v_BWE = window['v']
    place_W, place_B1 = jnp.arange(places), place_B[:, None]
    # The first chunk that the local branch reads, and the first place of the sequence.
    near_B1, zero_B1 = place_B1 // size - (spec.window - 1), place_B1 - position.start_B[:, None]
    near_BW = (place_W // size >= near_B1) & (place_W <= place_B1) & (place_W >= zero_B1)

    weights, o_B1E = [], 0
    if 'k' in window:
        bias_B1W = None
        if bias_B1M is not None:
            index_BW = jnp.clip(place_W - near_B1 * size, 0, spec.window * size - 1)
            bias_B1W = jnp.take_along_axis(bias_B1M, index_BW[:, None], axis=2)
        length = spec.window * size
        fields = {'scoring': spec.scoring, 'sequence_length': length, 'mask': near_BW[:, None], 'bias': bias_B1W}
        weights.append(attention_weights(q_B1S, window['k'], **fields))
    if 'sum' in window:
        # Of what the global branch reads, the window has one chunk at most.
        far_BW = (place_W // size < near_B1) & (place_W >= zero_B1)
        # The type of the sum outside the window.
        dtype = jnp.promote_types(v_BWE.dtype, jnp.float32)
        if gate_B11 is None:
            chunks_B1 = chunks_in_sum((position.start_B // size)[:, None], spec)
            q_lin_B1S = weights_of_state(q_lin_B1S, chunks_B1, spec, dtype)
        else:
            in_window_B1 = far_BW[:, :1]
            kept_B1 = jnp.where(in_window_B1, kept(window['gate'][:, :size]), 1)
            count_B1 = kept_B1 * window['count'] + size * in_window_B1
            q_lin_B1S = over_count(q_lin_B1S, count_B1, spec)
        k_lin_BWS = window['k_lin']
        far_B1W = jnp.einsum('BNS,BWS->BNW', q_lin_B1S.astype(k_lin_BWS.dtype), k_lin_BWS, preferred_element_type=dtype)
        weights.append(jnp.where(far_BW[:, None], far_B1W, 0))
        # The chunk that was completed in the window stands between the token and the sum.
        if gate_B11 is not None:
            q_lin_B1S *= kept_B1[:, None]
        o_B1E = q_lin_B1S.astype(v_BWE.dtype) @ window['sum']
    # The branches look at different places: one matmul serves both.
    return sum(weights).astype(v_BWE.dtype) @ v_BWE + o_B1E, window
