"""FLASH's mixed chunk attention (docs/paper.md section 3): quadratic inside chunks of C tokens, linear over all.

    V_quad[g] = f(Q_quad[g] K_quad[g]^T / C + b) V[g]                    the local branch, lower triangle if causal
    V_lin[g]  = Q_lin[g] mean(k v^T), k a row of K_lin, v of V           the global branch

The mean runs over the tokens a query may see: all of its document if bidirectional, those in strictly earlier chunks if
causal (so the first chunk gets exactly 0). No token of another document enters either branch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks, states_of_other_chunks
from gau.ops.gated_states import carried_states, log_decays, previous_chunk
from gau.ops.masks import clear_padding, visibility_mask
from gau.ops.scores import Scoring, attention_weights
from gau.ops.tracing import choose, traced_once


class ChunkSpec(NamedTuple):
    """Which mixed chunk attention.

    Attributes:
      chunk_size: C.
      scoring: attention function and normaliser of the local branch. The normaliser 'paper' divides by C also where a
        sequence is shorter, so that padding changes nothing.
      causal: whether later tokens are hidden.
      branches: 'both', 'local' or 'global'.
      global_reduction: 'mean' over the visible tokens (paper) or 'sum'.
      window: chunks that the local branch reads, the own one included: 1 (paper), or, if causal, 2. The global branch
        reads those before them.
    """

    chunk_size: int
    scoring: Scoring
    causal: bool
    branches: str = 'both'
    global_reduction: str = 'mean'
    window: int = 1

    @property
    def has_local(self) -> bool:
        """Whether tokens attend to their chunk."""
        return choose(self.branches, {'both': True, 'local': True, 'global': False})

    @property
    def has_global(self) -> bool:
        """Whether there is the linear attention over the sequence."""
        return choose(self.branches, {'both': True, 'local': False, 'global': True})

    @property
    def mean(self) -> bool:
        """Whether the global branch divides by the number of tokens."""
        return choose(self.global_reduction, {'mean': True, 'sum': False})


@traced_once('spec', 'impl', 'sequence_axis')
def mixed_chunk_attention(
    q_BNS: Array,
    k_BNS: Array,
    q_lin_BNS: Array,
    k_lin_BNS: Array,
    v_BNE: Array,
    *,
    spec: ChunkSpec,
    segment_ids_BN: Array | None = None,
    bias_CC: Array | None = None,
    gate_BN1: Array | None = None,
    impl: str = 'xla',
    sequence_axis: str | None = None,
) -> Array:
    """Returns V_quad + V_lin for one head.

    Args:
      q_BNS: queries of the local branch (not read where there is none).
      k_BNS: keys of the local branch.
      q_lin_BNS: queries of the global branch (not read where there is none).
      k_lin_BNS: keys of the global branch.
      v_BNE: values of both.
      spec: chunk size, branches and so on. N need not be a multiple of the chunk: the last one is padded here.
      segment_ids_BN: documents and padding, or None.
      bias_CC: relative position bias inside a chunk, at least [min(N, C), min(N, C)], or None; where the local branch
        reads two chunks and N is above C, [2 C, 2 C].
      gate_BN1: logits of a gate by which the state forgets, one for every token (`gau.ops.gated_states`). Causal. Or
        None.
      impl: 'reference' is a masked N x N form, right for any layout of segments; 'xla' is linear in N and asks that
        documents are contiguous.
      sequence_axis: mesh axis over whose devices the tokens are spread in order and in whole chunks, where this runs
        inside `jax.shard_map`; N is then the tokens of one device. The local branch needs no other device; of the
        global branch, one [S, E] state of each crosses the axis. None with the reference.

    Returns:
      [B, N, E] in the dtype of v; zeros at padding.

    Raises:
      ValueError: an unknown `impl`, branch or reduction; or a window or a gate if not causal.
    """
    if not spec.causal and (spec.window > 1 or gate_BN1 is not None):
        raise ValueError('a window of two chunks and a gate are of causal attention')
    arrays = [clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, q_lin_BNS, k_lin_BNS, v_BNE)]
    log_decay_BG1 = None
    if gate_BN1 is not None:
        log_decay_BG1 = log_decays(gate_BN1, segment_ids_BN, min(spec.chunk_size, v_BNE.shape[1]))
    elif spec.window > 1:
        log_decay_BG1 = jnp.zeros((1, 1, 1))
    chunked = functools.partial(_chunked, sequence_axis=sequence_axis)
    attend = choose(impl, {'reference': _reference, 'xla': chunked})
    return clear_padding(attend(*arrays, spec, segment_ids_BN, bias_CC, log_decay_BG1), segment_ids_BN)


def _reference(q, k, q_lin, k_lin, v, spec, segment_ids_BN, bias_CC, log_decay_BG1):
    """Both branches as masked N x N matrices."""
    n, causal = v.shape[1], spec.causal
    index = jnp.arange(n)
    chunk = index // spec.chunk_size
    visible_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=n, m=n, causal=False)
    visible_BNN = jnp.ones((1, n, n), bool) if visible_BNN is None else visible_BNN
    o_BNE = jnp.zeros(v.shape, v.dtype)
    if spec.has_local:
        mask_BNN = visible_BNN & (chunk[:, None] >= chunk) & (chunk[:, None] < chunk + spec.window)
        if causal:
            mask_BNN &= index[:, None] >= index
        bias_NN = None
        if bias_CC is not None:
            first = jnp.maximum(chunk - spec.window + 1, 0) * spec.chunk_size
            bias_NN = bias_CC[(index - first)[:, None], jnp.maximum(index - first[:, None], 0)]
        fields = {'scoring': spec.scoring, 'sequence_length': spec.window * spec.chunk_size}
        a_BNN = attention_weights(q, k, mask=mask_BNN, bias=bias_NN, **fields)
        o_BNE += a_BNN.astype(v.dtype) @ v
    if spec.has_global:
        mask_BNN = visible_BNN & (chunk[:, None] >= chunk + spec.window) if causal else visible_BNN
        dtype = jnp.promote_types(v.dtype, jnp.float32)
        a_BNN = jnp.einsum('BNS,BMS->BNM', q_lin, k_lin, preferred_element_type=dtype)
        weights_BNN = mask_BNN.astype(dtype)
        if log_decay_BG1 is not None:
            weights_BNN = _weights_by_decay(log_decay_BG1.astype(dtype), mask_BNN, spec)
        if spec.mean:
            total_BN1 = weights_BNN.sum(-1, keepdims=True)
            a_BNN /= jnp.where(total_BN1 > 0, total_BN1, 1)
        o_BNE += (a_BNN * weights_BNN).astype(v.dtype) @ v
    return o_BNE


def _weights_by_decay(log_decay_BG1, mask_BNN, spec):
    """The weights of tokens in a state: of each the product of the decays of the chunks in between."""
    n = mask_BNN.shape[-1]
    chunk, groups = jnp.arange(n) // spec.chunk_size, -(-n // spec.chunk_size)
    log_BG = jnp.broadcast_to(log_decay_BG1[..., 0], (len(log_decay_BG1), groups))
    # total[g]: the sum over the chunks before g.
    total_BG = jnp.pad(jnp.cumsum(log_BG, axis=1), ((0, 0), (1, 0)))
    until_BN, from_BN = (total_BG[:, g] for g in (jnp.maximum(chunk - spec.window + 1, 0), chunk + 1))
    between_BNN = jnp.where(mask_BNN, until_BN[:, :, None] - from_BN[:, None], 0)
    return jnp.where(mask_BNN, jnp.exp(between_BNN), 0)


def _chunked(q, k, q_lin, k_lin, v, spec, segment_ids_BN, bias_CC, log_decay_BG1, *, sequence_axis):
    """The linear form: chunks attend within themselves and read a state of what lies before, or before and after."""
    n = v.shape[1]
    size = min(spec.chunk_size, n)
    if segment_ids_BN is None and n % size and not spec.causal:
        segment_ids_BN = jnp.ones((1, n), jnp.int32)  # The zeros that fill the last chunk must be seen by nobody.
    ids_BGC = None if segment_ids_BN is None else into_chunks(segment_ids_BN, size)
    q, k, q_lin, k_lin, v_BGCE = (into_chunks(x, size) for x in (q, k, q_lin, k_lin, v))

    # All that a chunk attends to is collected as terms: weights, and what they weigh.
    a_BGCC = _weights_in_chunk(q, k, spec, ids_BGC, bias_CC, sequence_axis) if spec.has_local else None
    terms = []
    o_BGCE = 0
    if spec.has_global and log_decay_BG1 is not None:
        terms = [_read_carried(q_lin, k_lin, v_BGCE, spec, ids_BGC, log_decay_BG1, sequence_axis)]
    elif spec.has_global and not spec.causal and ids_BGC is None:
        o_BGCE = _read_all(q_lin, k_lin, v_BGCE, n, spec, sequence_axis)
    elif spec.has_global and (v_BGCE.shape[1] > 1 or not spec.causal or sequence_axis is not None):
        in_chunk_BGCC, terms = _read_other_chunks(q_lin, k_lin, v_BGCE, spec, ids_BGC, sequence_axis)
        if in_chunk_BGCC is not None:
            a_BGCC = in_chunk_BGCC if a_BGCC is None else a_BGCC + in_chunk_BGCC
    if a_BGCC is not None:
        two = a_BGCC.shape[-1] > a_BGCC.shape[-2]
        before = [previous_chunk(v_BGCE, sequence_axis)] if two else []
        terms.insert(0, (a_BGCC, jnp.concatenate([*before, v_BGCE], axis=2)))
    if terms:
        # One matmul, [A, Q_lin] [V; M], instead of one each: measured 2 % of a training step.
        left = jnp.concatenate([weights.astype(v.dtype) for weights, _ in terms], axis=-1)
        right = jnp.concatenate([value.astype(v.dtype) for _, value in terms], axis=-2)
        o_BGCE += left @ right
    elif not spec.has_global or spec.causal:
        o_BGCE = jnp.zeros_like(v_BGCE)
    return o_BGCE.reshape(v_BGCE.shape[0], -1, v_BGCE.shape[-1])[:, :n]


def _weights_in_chunk(q_BGCS, k_BGCS, spec, ids_BGC, bias_CC, sequence_axis):
    """The local branch's weights, [B, G, C, C]; [B, G, C, 2 C] where it reads the chunk before, too."""
    groups, size = q_BGCS.shape[1:3]
    if spec.window > 1 and (groups > 1 or sequence_axis is not None):
        ids_BGC = jnp.ones((1, groups, size), jnp.int32) if ids_BGC is None else ids_BGC
        k_BGMS, ids_BGM = (jnp.concatenate([previous_chunk(x, sequence_axis), x], axis=2) for x in (k_BGCS, ids_BGC))
        mask_BGCM = visibility_mask(ids_BGC, ids_BGM, n=size, m=2 * size, causal=True, first_query=size)
        bias_CM = None if bias_CC is None else bias_CC[size : 2 * size, : 2 * size]
        fields = {'scoring': spec.scoring, 'sequence_length': 2 * spec.chunk_size}
        return attention_weights(q_BGCS, k_BGMS, mask=mask_BGCM, bias=bias_CM, **fields)
    mask_BGCC = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=spec.causal)
    bias_CC = None if bias_CC is None else bias_CC[:size, :size]
    fields = {'scoring': spec.scoring, 'sequence_length': spec.window * spec.chunk_size}
    return attention_weights(q_BGCS, k_BGCS, mask=mask_BGCC, bias=bias_CC, **fields)


def _read_carried(q_lin_BGCS, k_lin_BGCS, v_BGCE, spec, ids_BGC, log_decay_BG1, sequence_axis):
    """The global branch as weights and what they weigh: queries [B, G, C, S] and states [B, G, S, E]."""
    ids_BGC = jnp.ones((1, *v_BGCE.shape[1:3]), jnp.int32) if ids_BGC is None else ids_BGC
    fields = {'delay': spec.window - 1, 'sequence_axis': sequence_axis}
    carried = carried_states(k_lin_BGCS, v_BGCE, ids_BGC, log_decay_BG1, **fields)
    q_lin_BGCS = jnp.where(carried.sees_BGC[..., None], q_lin_BGCS.astype(carried.count_BG1.dtype), 0)
    if spec.mean:
        q_lin_BGCS /= jnp.where(carried.count_BG1 > 0, carried.count_BG1, 1)[:, :, None]
    return q_lin_BGCS, carried.state_BGSE


def _read_all(q_lin_BGCS, k_lin_BGCS, v_BGCE, n, spec, sequence_axis):
    """The global branch where every query sees all n tokens: one state for all, [B, G, C, E]."""
    dtype = jnp.promote_types(v_BGCE.dtype, jnp.float32)
    kv_BSE = jnp.einsum('BGCS,BGCE->BSE', k_lin_BGCS, v_BGCE, preferred_element_type=dtype)
    if sequence_axis is not None:
        kv_BSE, n = jax.lax.psum((kv_BSE, n), sequence_axis)
    return jnp.einsum('BGCS,BSE->BGCE', q_lin_BGCS, (kv_BSE / n if spec.mean else kv_BSE).astype(v_BGCE.dtype))


def _read_other_chunks(q_lin_BGCS, k_lin_BGCS, v_BGCE, spec, ids_BGC, sequence_axis):
    """The global branch as weights and what they weigh.

    Returns:
      The weights on the own chunk, [B, G, C, C], which a causal query does not have: None.
      For each scan direction queries [B, G, C, S] and states [B, G, S, E].
    """
    groups, size = v_BGCE.shape[1:3]
    one_document = jnp.ones((1, groups, size), jnp.int32)
    seen = states_of_other_chunks(
        *(k_lin_BGCS, v_BGCE, one_document if ids_BGC is None else ids_BGC),
        causal=spec.causal,
        sequence_axis=sequence_axis,
    )
    count_BGC = sum(s.sees_BGC * s.count_BG[..., None] for s in seen)
    if not spec.causal:
        same_BGCC = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=False)
        count_BGC += same_BGCC.sum(-1)
    dtype = count_BGC.dtype
    scale_BGC = jnp.where(count_BGC > 0, 1 / jnp.maximum(count_BGC, 1) if spec.mean else 1, 0)
    q_lin_BGCS = q_lin_BGCS.astype(dtype) * scale_BGC[..., None]
    in_chunk_BGCC = None
    if not spec.causal:
        queries = q_lin_BGCS.astype(v_BGCE.dtype)
        in_chunk_BGCC = jnp.einsum('BGCS,BGMS->BGCM', queries, k_lin_BGCS, preferred_element_type=dtype)
        in_chunk_BGCC = jnp.where(same_BGCC, in_chunk_BGCC, 0)
    return in_chunk_BGCC, [(jnp.where(s.sees_BGC[..., None], q_lin_BGCS, 0), s.state_BGSE) for s in seen]
