"""FLASH's attention with its activations and its gate in kernels: the fast path of `gau.ops.gated_mixed_chunk`.

    [u, v] = silu([U, V])      o[g] = u[g] * (A[g] v[g] + Q[g] M[g])

What is [N, E] is read and written as little as possible, and the backward pass gets what was saved by hand: the
projections, A, Q and K, the states M, v and o. (A sequence of two chunks has no states: `gau.ops.kernels.chunk_pairs`.)

This file says which tokens see which, and hands weights, masked queries and keys and the scans' factors to
`gau.ops.kernels.gated_chunks`, which computes o and the gradients; on a TPU to `tpu_gated_chunks`, which does the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import first_and_last_document, into_chunks
from gau.ops.gated_states import log_decays, one_over_count, previous_chunk
from gau.ops.kernels import gated_chunks, tpu_gated_chunks
from gau.ops.kernels.far_chunks import choose as choose_far
from gau.ops.kernels.quadratic_weights import FUNCTIONS, describe_tokens, whole_weights
from gau.ops.kernels.sequence_shards import Shards, shards_of_scans
from gau.ops.kernels.window_weights import weights_in_window
from gau.ops.masks import visibility_mask
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.positions import bias_matrix
from gau.ops.recurrence import recurrence
from gau.ops.scores import attention_weights
from gau.ops.tracing import choose, traced_once


@traced_once('spec', 'far_chunks', 'kernels', 'sequence_axis')
def gated_mixed_chunk(
    p_BNW: Array,
    bias_2E: Array,
    q_BNS: Array,
    k_BNS: Array,
    q_lin_BNS: Array,
    k_lin_BNS: Array,
    *,
    spec: ChunkSpec,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
    gate_BN1: Array | None = None,
    far_BNS: tuple[Array, Array] | None = None,
    far_chunks: int = 0,
    kernels: str = 'triton',
    sequence_axis: str | None = None,
) -> Array:
    """Returns what its reference in `gau.ops.gated_mixed_chunk` does; see there for the arguments.

    `kernels` are 'triton', for a GPU, or 'pallas', for a TPU. The latter may run inside `jax.shard_map` with the tokens
    in order and in whole chunks over the devices of the mesh axis `sequence_axis`; N is then those of one device.

    Raises:
      ValueError: unknown `kernels`, a `sequence_axis` for 'triton', or what the kernels do not have: a gate or a window
        of two chunks that is not causal; far chunks for 'pallas'.
    """
    if not spec.causal and (spec.window > 1 or gate_BN1 is not None):
        raise ValueError('a window of two chunks and a gate are of causal attention')
    if sequence_axis is not None and kernels == 'triton':
        raise ValueError("kernels='triton' take whole sequences")
    if far_BNS is not None and kernels != 'triton':
        raise ValueError(f'kernels={kernels!r} have no far chunks')
    module = choose(kernels, {'triton': gated_chunks, 'pallas': tpu_gated_chunks})
    batch, n = p_BNW.shape[:2]
    size, dtype, causal = min(spec.chunk_size, n), p_BNW.dtype, spec.causal
    q, k, q_lin, k_lin = (into_chunks(x, size) for x in (q_BNS, k_BNS, q_lin_BNS, k_lin_BNS))
    # The zeros that fill the last chunk belong to no document; without segment ids all tokens are one document.
    ids_BGC = into_chunks(jnp.ones((1, n), jnp.int32) if segment_ids_BN is None else segment_ids_BN, size)
    # One document and no zeros: the weights have no ids to compare.
    ids_to_compare = None if segment_ids_BN is None and n % size == 0 else ids_BGC
    a_BGCM = weights_in_chunks(q, k, bias_P, ids_to_compare, spec, kernels, sequence_axis)
    gated, fields = gate_BN1 is not None, {'window': spec.window, 'sequence_axis': sequence_axis}
    # A gate decides what a mean is over.
    scans = _scans(ids_BGC, causal=causal, mean=spec.mean and not gated, **fields)
    if gated:
        log_decay_BG1 = log_decays(gate_BN1, segment_ids_BN, size)
        # Scales of states have no gradient in the Pallas kernels.
        scans = _with_gate(scans, log_decay_BG1, mean=spec.mean, scale_queries=kernels == 'pallas', **fields)
    carry_mask_BGK = scans.carry_mask_BGJ
    if gated and kernels == 'pallas':
        # There only factors of rows have a gradient.
        carry_mask_BGK = jnp.broadcast_to(carry_mask_BGK, (*carry_mask_BGK.shape[:2], q_lin.shape[-1]))
    if scans.query_scale_BGCS is not None:
        q_lin = q_lin.astype(scans.query_scale_BGCS.dtype) * scans.query_scale_BGCS
    if not causal:
        in_chunk = jnp.einsum(
            'BGCS,BGMS->BGCM', q_lin.astype(dtype), k_lin.astype(dtype), preferred_element_type=q_lin.dtype
        )
        same_BGCC = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=False)
        a_BGCM = a_BGCM + jnp.where(same_BGCC, in_chunk, 0).astype(dtype)
    if segment_ids_BN is None:
        # No masks: the first chunk of a scan reads a state of zeros, and the zeros of the last chunk add nothing.
        q_BGCF, k_BGCF = (jnp.concatenate([x] * len(scans.query_masks), axis=-1) for x in (q_lin, k_lin))
    else:
        q_BGCF = jnp.concatenate([jnp.where(mask[..., None], q_lin, 0) for mask in scans.query_masks], axis=-1)
        k_BGCF = jnp.concatenate([jnp.where(mask[..., None], k_lin, 0) for mask in scans.key_masks], axis=-1)
    by_chunk = carry_mask_BGK, scans.state_scale_BGJ
    # What only one of both modules has.
    more = () if scans.shards is None else (scans.shards, sequence_axis)
    if far_BNS is not None:
        more = (choose_far(*(into_chunks(x, size) for x in far_BNS), ids_BGC, far_chunks),)
    o_BGCE = module.gated_chunk_matmul(
        into_chunks(p_BNW, size),
        bias_2E,
        a_BGCM,
        q_BGCF.astype(dtype),
        k_BGCF.astype(dtype),
        *(jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in by_chunk),
        causal,
        *more,
    )
    return o_BGCE.reshape(batch, -1, o_BGCE.shape[-1])[:, :n]


def weights_in_chunks(
    q_BGCS: Array,
    k_BGCS: Array,
    bias_P: Array | None,
    ids_BGC: Array | None,
    spec: ChunkSpec,
    kernels: str,
    sequence_axis: str | None = None,
) -> Array:
    """Returns the attention weights inside chunks, [B, G, C, C] in the type of q; no ids are one whole document.

    With a window of two, [B, G, C, 2 C]: on the chunk before and on the own one. A chunk alone is a window of one.
    """
    scoring, causal = spec.scoring, spec.causal
    shape, size = q_BGCS.shape[:3], q_BGCS.shape[2]
    ids_BGM, keys, length = ids_BGC, size, spec.window * spec.chunk_size
    in_window = spec.window > 1 and (shape[1] > 1 or sequence_axis is not None)
    if in_window:
        keys = 2 * size
        if ids_BGC is None and (kernels != 'triton' or scoring.compares_keys):
            # Nobody reads weights on what would be before the first chunk, but those on others may depend on them.
            ids_BGC = jnp.ones((1, *shape[1:]), jnp.int32)
        if ids_BGC is not None:
            ids_BGM = jnp.concatenate([previous_chunk(ids_BGC, sequence_axis), ids_BGC], axis=2)
    if scoring.function in FUNCTIONS and kernels == 'triton':
        ids = None if ids_BGM is None else jnp.broadcast_to(ids_BGM, (*shape[:2], keys)).reshape(-1, keys)
        fields = {'scoring': scoring, 'causal': causal, 'sequence_length': length, 'width': q_BGCS.shape[-1]}
        tokens = describe_tokens(ids, (shape[0] * shape[1], keys), **fields)
        bias_P = None if bias_P is None else bias_P.astype(jnp.float32)
        if in_window:
            return weights_in_window(q_BGCS, k_BGCS, bias_P, tokens)
        q, k = (x.reshape(-1, *x.shape[2:]) for x in (q_BGCS, k_BGCS))
        return whole_weights(q, k, bias_P, tokens, causal).reshape(*shape, keys)
    if in_window:
        k_BGCS = jnp.concatenate([previous_chunk(k_BGCS, sequence_axis), k_BGCS], axis=2)
    first = keys - size
    mask = visibility_mask(ids_BGC, ids_BGM, n=size, m=keys, causal=causal, first_query=first)
    bias = None if bias_P is None else bias_matrix(bias_P, size, keys, first=first)
    a = attention_weights(q_BGCS, k_BGCS, scoring=scoring, sequence_length=length, mask=mask, bias=bias)
    return a.astype(q_BGCS.dtype)


class _Scans(NamedTuple):
    """What the scans over the chunks mask and scale, one scan for each of J directions.

    Attributes:
      query_masks: for each direction, bool [B, G, C]: the tokens that read the state carried to their chunk.
      key_masks: for each direction, bool [B, G, C]: the tokens that a chunk adds to the state.
      carry_mask_BGJ: 1, or what a gate keeps, where a state is carried on over a chunk, 0 where it is dropped there;
        float32.
      state_scale_BGJ: factor on the state that a chunk reads, float32. If causal, it makes means of sums: all queries
        of a chunk see the same tokens of other chunks. Else it is 1.
      query_scale_BGCS: where that makes means of sums, a factor on each query, [B, G, C, 1] or [B, G, 1, 1]; else None.
      shards: how scans go on from device to device, or None.
    """

    query_masks: list[Array]
    key_masks: list[Array]
    carry_mask_BGJ: Array
    state_scale_BGJ: Array
    query_scale_BGCS: Array | None
    shards: Shards | None


def _scans(ids_BGC: Array, *, causal: bool, mean: bool, window: int, sequence_axis: str | None) -> _Scans:
    """Returns masks and scales of the forward scan and, unless causal, of the reverse one.

    A scan carries the state of one document, the one that is open at the start of a chunk. To this state a chunk adds
    its tokens of the document that is open at its end; if that is another document, the carried state is dropped first.
    In a window of two a chunk reads the state that was carried to the chunk before, which has that chunk's scale.
    """
    own_ids_BGC, own = ids_BGC, lambda x: x
    if sequence_axis is not None:
        # Ids are small: every device has all of them, and cuts its own part out of what follows from them.
        on_device, device = ids_BGC.shape[1], jax.lax.axis_index(sequence_axis)
        own = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=device * on_device, slice_size=on_device, axis=1
        )
        ids_BGC = jax.lax.all_gather(ids_BGC, sequence_axis, axis=1, tiled=True)
    first_BG, last_BG = first_and_last_document(ids_BGC)
    query_masks, key_masks, carry_masks, state_scales, counts_BGC = [], [], [], [], []
    for reverse in (False,) if causal else (False, True):
        flip = (lambda x: x[:, ::-1]) if reverse else (lambda x: x)
        leaves_BG = flip(first_BG if reverse else last_BG)
        key_mask_BGC = (flip(ids_BGC) == leaves_BG[..., None]) & (flip(ids_BGC) > 0)
        # The document of the last chunk so far that was not all padding.
        groups = jnp.arange(leaves_BG.shape[1])
        latest_BG = jax.lax.cummax(jnp.where(leaves_BG > 0, groups, -1), axis=1)
        after_BG = jnp.where(latest_BG < 0, 0, jnp.take_along_axis(leaves_BG, jnp.maximum(latest_BG, 0), axis=1))
        open_BG = jnp.pad(after_BG, ((0, 0), (1, 0)))[:, :-1]
        carry_mask_BG = ((after_BG == open_BG) & (open_BG > 0)).astype(jnp.float32)
        counts = carry_mask_BG, key_mask_BGC.sum(-1).astype(jnp.float32)
        total_BG = recurrence(*(x[..., None] for x in counts))[..., 0]
        carried_BG = jnp.pad(total_BG, ((0, 0), (1, 0)))[:, :-1]
        if window > 1:
            open_BG = previous_chunk(open_BG)
        query_mask_BGC = (flip(ids_BGC) == open_BG[..., None]) & (flip(ids_BGC) > 0)
        scale_BG = one_over_count(carried_BG) if causal and mean else jnp.ones_like(carried_BG)
        state_scales.append(flip(scale_BG))
        counts_BGC.append(flip(query_mask_BGC * carried_BG[..., None]))
        query_masks.append(flip(query_mask_BGC))
        key_masks.append(flip(key_mask_BGC))
        carry_masks.append(flip(carry_mask_BG))
    carry_mask_BGJ, state_scale_BGJ = (jnp.stack(x, axis=-1) for x in (carry_masks, state_scales))
    query_masks, key_masks = [own(x) for x in query_masks], [own(x) for x in key_masks]
    shards = None
    if sequence_axis is not None:
        shards = shards_of_scans(_as_scanned(carry_mask_BGJ, window), on_device, device)
    query_scale_BGCS = None
    if not causal:
        size, ids_BGC = own_ids_BGC.shape[-1], own_ids_BGC
        count_BGC = own(sum(counts_BGC)) + visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=False).sum(-1)
        query_scale_BGCS = jnp.where(count_BGC > 0, 1 / jnp.maximum(count_BGC, 1) if mean else 1.0, 0.0)[..., None]
    return _Scans(query_masks, key_masks, own(carry_mask_BGJ), own(state_scale_BGJ), query_scale_BGCS, shards)


def _as_scanned(x_BG: Array, window: int) -> Array:
    """Returns what is of chunks at the chunks where a scan has come to it: in a window of two a chunk late."""
    return previous_chunk(x_BG) if window > 1 else x_BG


def _with_gate(
    scans: _Scans,
    log_decay_BG1: Array,
    *,
    mean: bool,
    scale_queries: bool,
    window: int,
    sequence_axis: str | None,
) -> _Scans:
    """Returns the forward scan with a gate's factors [B, G, 1] in the place of its carry mask, and means of its sums.

    They are made by a factor on queries if `scale_queries`; else on states.
    """
    carry_BG1 = scans.carry_mask_BGJ * jnp.exp(log_decay_BG1)
    added_BG1 = jnp.broadcast_to(scans.key_masks[0].sum(-1).astype(jnp.float32)[..., None], carry_BG1.shape)
    counts, own, shards = (carry_BG1, added_BG1), lambda x: x, None
    if sequence_axis is not None:
        on_device, device = carry_BG1.shape[1], jax.lax.axis_index(sequence_axis)
        counts = tuple(jax.lax.all_gather(x, sequence_axis, axis=1, tiled=True) for x in counts)
        own = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=device * on_device, slice_size=on_device, axis=1
        )
        shards = shards_of_scans(_as_scanned(counts[0], window), on_device, device)
    scans = scans._replace(carry_mask_BGJ=carry_BG1, shards=shards)
    if not mean:
        return scans
    carried_BG1 = jnp.pad(recurrence(*counts), ((0, 0), (1, 0), (0, 0)))[:, :-1]
    scale_BG1 = one_over_count(carried_BG1)
    if scale_queries:
        return scans._replace(query_scale_BGCS=own(_as_scanned(scale_BG1, window))[:, :, None])
    return scans._replace(state_scale_BGJ=own(scale_BG1))
