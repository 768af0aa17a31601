"""The recurrent forms of causal attention: a state, a block of new tokens in, their outputs and the new state out.

A sequence is decoded in blocks of T tokens: a prompt in large ones, then T = 1. Every row has a position of its own,
`start`, and takes the first `length` tokens of the block (0..T); the rest of the row is padding, which changes nothing.
The states, for one head (H goes after B):

    quadratic      k [B, M, S], v [B, M, E]: every token so far, at most M
    mixed chunk    k, k_lin [B, C, S], v [B, C, E]: the current chunk, and
                   sum [B, S, E]: k_lin v^T over all complete chunks, float32; their tokens are C * (start // C). Where
                   a gate decides what the sum keeps, also gate [B, C, 1]: its logits in the current chunk, and
                   count [B, 1]: the tokens of sum by weight.
                   With a window of two chunks k, k_lin, v and gate have 2 C places, the chunk before and the current
                   one, and sum and count are over the chunks before these
    linear         sum [B, F, K + 1]: phi(k) (v, 1)^T over all tokens, float32, F features; with FAVOR+ log_scale [B]:
                   the sum is to be multiplied by exp of it

All are zeros at the start of a sequence. What stands in them beyond a row's position is never read. With blocks of any
lengths the outputs are those of the parallel form (docs/paper.md section 3: one S x E state, at most one chunk of K
and V).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import LOWEST, add_scaled, into_chunks, relative_weights
from gau.ops.gated_states import after_chunk, previous_chunk
from gau.ops.linear_attention import quotient
from gau.ops.masks import clear_padding
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import Scoring, attention_weights
from gau.ops.tracing import choose

State = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodePosition:
    """Where the tokens of a block stand.

    Attributes:
      start_B: int32, tokens of each row before the block.
      length_B: int32, tokens of the block that are the row's, the first ones.
      opened_B: int32, tokens of each row before the window, where single tokens are decoded in one
        (`gau.ops.chunk_window`); else None.
      reader: what takes a block of more than one token. 'reference': the functions here. 'training': training's
        implementation, as it takes whole sequences; rows stand where it needs them
        (`gau.models.attentions.record.Attention.whole_blocks`). 'short' and 'long': the kernels of blocks where the
        model decodes in kernels; rows stand where a chunk begins, and the block has whole chunks. With a window of two
        chunks rows that a short block is of begin with it.
      capacity: M, where the state of a quadratic attention is still to be made; None where it exists.
      in_place: whether kernels may write over the state that they are given. Not where layers are scanned: XLA takes
        a part of what a loop collects for a kernel's result, and lets it write there and not over its input.
    """

    start_B: Array
    length_B: Array
    opened_B: Array | None = None
    reader: str = dataclasses.field(default='reference', metadata={'static': True})
    capacity: int | None = dataclasses.field(default=None, metadata={'static': True})
    in_place: bool = dataclasses.field(default=True, metadata={'static': True})

    @property
    def whole(self) -> bool:
        """Whether training's implementation takes the block."""
        return choose(self.reader, {'reference': False, 'training': True, 'short': False, 'long': False})

    @property
    def for_kernels(self) -> bool:
        """Whether kernels of decoding may take it: a single token in a window, or a block."""
        return self.in_place and (self.opened_B is not None or self.reader in ('short', 'long'))

    def real_BT(self, n: int) -> Array:
        """Returns which of the block's n tokens are not padding, as segment ids, int32 [B, n]."""
        return (jnp.arange(n) < self.length_B[:, None]).astype(jnp.int32)

    def positions_BT(self, n: int) -> Array:
        """Returns the position of each token of the block in its row's sequence, int32 [B, n]."""
        return self.start_B[:, None] + jnp.arange(n)


def quadratic_block(
    q_BTS: Array,
    k_BTS: Array,
    v_BTE: Array,
    state: State,
    *,
    position: DecodePosition,
    scoring: Scoring,
    bias_BTM: Array | None = None,
) -> tuple[Array, State]:
    """Decodes a block with quadratic attention: keys and values are the state, M of them at most.

    A token beyond the M-th has no place in the state; its output is NaN, so that an overrun is noticed.

    Args:
      q_BTS: queries.
      k_BTS: keys.
      v_BTE: values.
      state: `k` and `v` (module docstring).
      position: where the tokens stand.
      scoring: attention function and normaliser; not 'paper', whose n is the length of a sequence that is not over yet.
      bias_BTM: relative bias between the block's tokens and all M places, or None.

    Returns:
      Outputs [B, T, E] in the dtype of v, meaningless at padding, and the new state.

    Raises:
      ValueError: the normaliser is 'paper'.
    """
    if scoring.normalizer == 'paper':
        raise ValueError(
            'normalizer=paper needs the length of the whole sequence, which is not known while it is decoded'
        )
    t = q_BTS.shape[1]
    capacity = state['k'].shape[1]
    positions_BT = position.positions_BT(t)
    places_BT = jnp.where(position.real_BT(t) > 0, positions_BT, capacity)
    rows_B1 = jnp.arange(q_BTS.shape[0])[:, None]
    k_BMS, v_BME = (state[name].at[rows_B1, places_BT].set(x, mode='drop') for name, x in (('k', k_BTS), ('v', v_BTE)))
    mask_BTM = jnp.arange(capacity) <= positions_BT[..., None]
    a_BTM = attention_weights(q_BTS, k_BMS, scoring=scoring, sequence_length=capacity, mask=mask_BTM, bias=bias_BTM)
    o_BTE = a_BTM.astype(v_BME.dtype) @ v_BME
    return jnp.where((positions_BT < capacity)[..., None], o_BTE, jnp.nan), {'k': k_BMS, 'v': v_BME}


def with_places(x_MS: Array, places: int) -> Array:
    """Returns an array of a state [..., M, S] with so many places M: its first ones, and zeros behind them."""
    missing = max(0, places - x_MS.shape[-2])
    return jnp.pad(x_MS[..., :places, :], [(0, 0)] * (x_MS.ndim - 2) + [(0, missing), (0, 0)])


def linear_block(
    q_BTF: Array,
    k_BTF: Array,
    v_BTK: Array,
    key_log_scale_BT: Array | None,
    state: State,
    *,
    position: DecodePosition,
) -> tuple[Array, State]:
    """Decodes a block with Performer's linear attention: `gau.ops.linear_attention`, one sum carried on.

    Args:
      q_BTF: features phi(q), non-negative.
      k_BTF: features phi(k), non-negative.
      v_BTK: values.
      key_log_scale_BT: the logarithm of each key's factor, or None.
      state: `sum` and, with factors, `log_scale` (module docstring); the value of 1 beside the others sums up to the
        denominator.
      position: where the tokens stand.

    Returns:
      Outputs [B, T, K] in the dtype of v, meaningless at padding, and the new state.
    """
    t = q_BTF.shape[1]
    real_BT, dtype = position.real_BT(t), state['sum'].dtype
    ones_BT1 = jnp.ones((*v_BTK.shape[:2], 1), dtype)
    v_BTL = clear_padding(jnp.concatenate([v_BTK.astype(dtype), ones_BT1], axis=-1), real_BT)
    q_BTF, k_BTF = q_BTF.astype(dtype), clear_padding(k_BTF.astype(dtype), real_BT)
    sees_BTM = jnp.tril(jnp.ones((t, t), bool)) & (real_BT > 0)[:, None]
    log_scale_B1M = log_scale_B = log_scale_BT = None
    if key_log_scale_BT is not None:
        log_scale_B1M = key_log_scale_BT[:, None]
        log_scale_B = jnp.where(position.start_B > 0, state['log_scale'], LOWEST)
        log_scale_BT = jnp.broadcast_to(log_scale_B[:, None], key_log_scale_BT.shape)

    # Every sum comes over the largest factor in it. A query's is cancelled by the quotient; the state's stays.
    weights_BTM, top_BT = relative_weights(sees_BTM, log_scale_B1M, dtype)
    a_BTM = jnp.where(sees_BTM, jnp.einsum('BTF,BMF->BTM', q_BTF, k_BTF) * weights_BTM, 0)
    near_BT1L, far_BT1L = (a_BTM @ v_BTL)[:, :, None], (q_BTF @ state['sum'])[:, :, None]
    o_BT1L, _ = add_scaled(near_BT1L, top_BT, far_BT1L, log_scale_BT)
    weights_B1M, top_B1 = relative_weights((real_BT > 0)[:, None], log_scale_B1M, dtype)
    kv_BFL = jnp.einsum('BTF,BTL->BFL', k_BTF * weights_B1M[:, 0, :, None], v_BTL)
    sum_BFL, log_scale_B = add_scaled(state['sum'], log_scale_B, kv_BFL, None if top_B1 is None else top_B1[:, 0])
    new = {'sum': sum_BFL} if log_scale_B is None else {'sum': sum_BFL, 'log_scale': log_scale_B}
    return quotient(o_BT1L[:, :, 0]).astype(v_BTK.dtype), new


def mixed_chunk_block(
    q_BTS: Array,
    k_BTS: Array,
    q_lin_BTS: Array,
    k_lin_BTS: Array,
    v_BTE: Array,
    state: State,
    *,
    position: DecodePosition,
    spec: ChunkSpec,
    gate_BT1: Array | None = None,
    bias_CC: Array | None = None,
) -> tuple[Array, State]:
    """Decodes a block with FLASH's mixed chunk attention; the cost does not depend on what was read before.

    Args:
      q_BTS: queries of the local branch (not read where there is none).
      k_BTS: keys of the local branch.
      q_lin_BTS: queries of the global branch (not read where there is none).
      k_lin_BTS: keys of the global branch.
      v_BTE: values of both.
      state: `v`; with a local branch `k`; with a global branch `k_lin` and `sum` (module docstring).
      position: where the tokens stand.
      spec: chunk size, branches and so on, causal.
      gate_BT1: logits of a gate of the state, or None.
      bias_CC: relative bias in a window of W chunks, [W C, W C]; for a block of one token its row [B, 1, W C]; or None.

    Returns:
      Outputs [B, T, E] in the dtype of v, meaningless at padding, and the new state.
    """
    new = {'v': v_BTE}
    if spec.has_local:
        new['k'] = k_BTS
    if spec.has_global:
        new['k_lin'] = k_lin_BTS
    if gate_BT1 is not None:
        new['gate'] = gate_BT1
    decode = _one_token if v_BTE.shape[1] == 1 else _whole_chunks
    return decode(q_BTS, q_lin_BTS, new, state, position, spec, bias_CC)


def over_count(q_lin: Array, count: Array, spec: ChunkSpec) -> Array:
    """Returns queries [..., N, S]; for a mean over `count`, the summed weights [..., 1] of a gated state's tokens."""
    return q_lin.astype(count.dtype) / (jnp.where(count > 0, count, 1)[..., None, :] if spec.mean else 1)


def kept(gate: Array) -> Array:
    """Returns which part of a state a chunk keeps, [..., 1], from the gate's logits of its tokens [..., C, 1]."""
    return jax.nn.sigmoid(gate.mean(-2))


def chunks_in_sum(chunks: Array, spec: ChunkSpec) -> Array:
    """Returns how many chunks are in the state that a token reads, given how many come before its own."""
    return jnp.maximum(chunks - (spec.window - 1), 0)


def weights_of_state(q_lin: Array, chunks: Array, spec: ChunkSpec, dtype) -> Array:
    """Returns queries of the global branch times `scale_of_state`: with the state they make its outputs."""
    return q_lin.astype(dtype) * scale_of_state(chunks, spec, dtype)[..., None]


def scale_of_state(chunks: Array, spec: ChunkSpec, dtype) -> Array:
    """Returns the factor with which a state of so many chunks is read: 1 / its tokens for a mean; 0 if empty."""
    count = chunks * spec.chunk_size
    return jnp.where(chunks > 0, 1 / jnp.maximum(count, 1).astype(dtype) if spec.mean else 1, 0).astype(dtype)


def _one_token(q_B1S, q_lin_B1S, new, state, position, spec, bias_B1M):
    """The token joins its chunk and reads its window and the state; a chunk that leaves the window joins the state."""
    size, window = spec.chunk_size, spec.window * spec.chunk_size
    offset_B, chunks_B = position.start_B % size, position.start_B // size
    rows_B = jnp.arange(offset_B.shape[0])
    own_B = window - size + offset_B
    place_B = jnp.where(position.length_B > 0, own_B, window)
    state = state | {name: state[name].at[rows_B, place_B].set(x[:, 0], mode='drop') for name, x in new.items()}
    v_BME = state['v']

    left, right = [], []
    if 'k' in state:
        place_M = jnp.arange(window)
        mask_B1M = ((place_M <= own_B[:, None]) & (place_M >= own_B[:, None] - position.start_B[:, None]))[:, None]
        fields = {'scoring': spec.scoring, 'sequence_length': window, 'mask': mask_B1M, 'bias': bias_B1M}
        left.append(attention_weights(q_B1S, state['k'], **fields))
        right.append(v_BME)
    if 'sum' in state:
        total_BSE = state['sum']
        if 'gate' in state:
            left.append(over_count(q_lin_B1S, state['count'], spec))
        else:
            left.append(weights_of_state(q_lin_B1S, chunks_in_sum(chunks_B, spec)[:, None], spec, total_BSE.dtype))
        right.append(total_BSE)
    full_B = offset_B + position.length_B == size
    if 'sum' in state:
        # The first chunk of the window; there is none before the sequence.
        leaves_B = full_B & (chunks_B >= spec.window - 1)
        if 'gate' in state:
            kept_B1 = jnp.where(leaves_B[:, None], kept(state['gate'][:, :size]), 1)
            state['count'] = kept_B1 * state['count'] + jnp.where(leaves_B, size, 0)[:, None]

        def folded(total_BSE):
            k_BCS = jnp.where(leaves_B[:, None, None], state['k_lin'][:, :size], 0)
            kv_BSE = jnp.einsum('BCS,BCE->BSE', k_BCS, v_BME[:, :size], preferred_element_type=total_BSE.dtype)
            if 'gate' in state:
                total_BSE = kept_B1[..., None] * total_BSE
            return total_BSE + kv_BSE

        state['sum'] = jax.lax.cond(leaves_B.any(), folded, lambda total_BSE: total_BSE, total_BSE)
    if spec.window > 1:
        by_token = {name: state[name] for name in new}
        moved = functools.partial(jax.tree.map, lambda x: jnp.where(full_B[:, None, None], jnp.roll(x, -size, 1), x))
        state |= jax.lax.cond(full_B.any(), moved, lambda arrays: arrays, by_token)
    branches = [
        weights.astype(v_BME.dtype) @ values.astype(v_BME.dtype) for weights, values in zip(left, right, strict=True)
    ]
    return sum(branches), state


def _whole_chunks(q_BTS, q_lin_BTS, new, state, position, spec, bias_MM):
    """What the state has by token and the block, laid end to end, as chunks."""
    t, size, before = q_BTS.shape[1], spec.chunk_size, spec.window - 1
    offset_B = position.start_B % size
    # One chunk more than the block fills: it begins somewhere inside the current one.
    chunks = spec.window + -(-t // size)
    first_B = before * size + offset_B
    index_N = jnp.arange(chunks * size)
    real_BN = (index_N < (first_B + position.length_B)[:, None]) & (index_N >= (first_B - position.start_B)[:, None])

    def laid_out(state_BMS, block_BTS):
        x_BNS = jnp.pad(state_BMS, ((0, 0), (0, (chunks - spec.window) * size), (0, 0)))
        x_BNS = jax.vmap(lambda x, y, r: jax.lax.dynamic_update_slice_in_dim(x, y, r, 0))(x_BNS, block_BTS, first_B)
        return clear_padding(x_BNS, real_BN)

    whole = {name: laid_out(state[name], x) for name, x in new.items()}
    split = {name: into_chunks(x, size) for name, x in whole.items()}
    nothing_BMS = jnp.zeros((q_BTS.shape[0], spec.window * size, q_BTS.shape[-1]), q_BTS.dtype)

    def in_window(x_BGC):
        return jnp.concatenate([previous_chunk(x_BGC), x_BGC], axis=2) if before else x_BGC

    left, right = [], []
    if 'k' in split:
        causal_CM = jnp.tril(jnp.ones((size, spec.window * size), bool), before * size)
        mask_BGCM = causal_CM & in_window(into_chunks(real_BN, size))[:, :, None]
        bias_CM = None if bias_MM is None else bias_MM[before * size :]
        fields = {'scoring': spec.scoring, 'sequence_length': spec.window * size, 'mask': mask_BGCM, 'bias': bias_CM}
        left.append(attention_weights(into_chunks(laid_out(nothing_BMS, q_BTS), size), in_window(split['k']), **fields))
        right.append(in_window(split['v']))
    complete_B = (offset_B + position.length_B) // size
    new_state = {}
    if 'k_lin' in split:
        dtype = state['sum'].dtype
        kv_BGSE = jnp.einsum('BGCS,BGCE->BGSE', split['k_lin'], split['v'], preferred_element_type=dtype)
        # [g]: the sum over what lies before chunk g.
        sums_BGSE = jnp.concatenate([state['sum'][:, None], kv_BGSE], axis=1)
        chunk_BG = (position.start_B // size)[:, None] + jnp.arange(chunks) - before
        if 'gate' in split:
            sums_BGSE, count_BG1 = _sums_with_gate(state, kept(split['gate']), kv_BGSE, (chunk_BG >= 0) * size)
            new_state['count'] = jnp.take_along_axis(count_BG1, complete_B[:, None, None], axis=1)[:, 0]
        else:
            sums_BGSE = jnp.cumsum(sums_BGSE, axis=1)

        def read(x_BG):
            """What each chunk reads of what lies before chunks; the first of a window of two is nobody's."""
            return previous_chunk(x_BG[:, :-1]) if before else x_BG[:, :-1]

        q_lin_BGCS = into_chunks(laid_out(nothing_BMS, q_lin_BTS), size)
        if 'gate' in split:
            left.append(over_count(q_lin_BGCS, read(count_BG1), spec))
        else:
            left.append(weights_of_state(q_lin_BGCS, chunks_in_sum(chunk_BG, spec)[..., None], spec, dtype))
        right.append(read(sums_BGSE))
        new_state['sum'] = jnp.take_along_axis(sums_BGSE, complete_B[:, None, None, None], axis=1)[:, 0]
    dtype = split['v'].dtype
    left, right = ([x.astype(dtype) for x in side] for side in (left, right))
    # One matmul serves both branches.
    o_BNE = (jnp.concatenate(left, axis=-1) @ jnp.concatenate(right, axis=-2)).reshape(*whole['v'].shape)

    def cut(x_BNS, first_B, n):
        return jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, n, 0))(x_BNS, first_B)

    new_state |= {name: cut(x, complete_B * size, spec.window * size) for name, x in whole.items()}
    return cut(o_BNE, first_B, t), new_state


def _sums_with_gate(state: State, factor_BG1: Array, kv_BGSE: Array, tokens_BG: Array) -> tuple[Array, Array]:
    """Returns sum and count as they are before the first of G chunks, of so many tokens, and after each of them."""

    def step(carry, chunk):
        carry = after_chunk(carry, *chunk)
        return carry, carry

    start = state['sum'], state['count']
    n_BG1 = tokens_BG[..., None].astype(factor_BG1.dtype)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (factor_BG1, (kv_BGSE, n_BG1)))
    _, after = jax.lax.scan(step, start, xs)
    return jax.tree.map(lambda x, y: jnp.moveaxis(jnp.concatenate([x[None], y]), 0, 1), start, after)
