"""Exact attention to a few whole earlier chunks, chosen once for all queries of a chunk.

    r[g, i] = mean(q of chunk g - 1) . mean(k of chunk i), i < g            how well chunk i fits
    R[g]    = chunk g - 1, and the others of the largest r[g, i]: `chunks` in all
    w[t, s] = exp(q[t] . (k[s] + mean(k of chunk i)) / sqrt(S))             t in chunk g, s in chunk i of R[g]
    o[t]    = sum of w[t, s] v[s] over s  /  (1 + sum of w[t, s] over s)

The choice is made of earlier chunks alone: the queries of the own chunk would tell its first tokens of its last ones. A
choice has no gradient; the mean key stands in the weight as well, and gets one there from every query. The 1 lets a
query read nothing. Of every chunk only the tokens of the query's document count, in means as in sums.

Work and memory grow with N, but for two small terms: r, and the gradients of what was taken, a matmul that is G / C of
the attention's. In a gated unit `gau.ops.kernels.far_chunks` is the fast path.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import LOWEST, first_and_last_document, into_chunks
from gau.ops.masks import clear_padding, visibility_mask
from gau.ops.tracing import choose, traced_once


@traced_once('chunk_size', 'chunks', 'impl')
def far_chunks(
    q_BNS: Array,
    k_BNS: Array,
    v_BNE: Array,
    *,
    chunk_size: int,
    chunks: int,
    segment_ids_BN: Array | None = None,
    impl: str = 'xla',
) -> Array:
    """Returns o for one head, [B, N, E] in the dtype of v; zeros in the first chunk of a document and at padding.

    Args:
      q_BNS: queries.
      k_BNS: keys.
      v_BNE: values.
      chunk_size: C. N need not be a multiple of it.
      chunks: how many chunks are read, at least 1; a chunk with fewer before it reads all of them.
      segment_ids_BN: documents and padding, or None.
      impl: 'reference' is a masked N x N form, right for any layout of segments; 'xla' asks that documents are
        contiguous. It computes the weights again in the backward pass, and saves none.

    Raises:
      ValueError: an unknown `impl`.
    """
    attend = choose(impl, {'reference': _reference, 'xla': _chunked})
    q_BNS, k_BNS, v_BNE = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    ids_BN = jnp.ones(v_BNE.shape[:2], jnp.int32) if segment_ids_BN is None else segment_ids_BN
    o_BNE = attend(q_BNS, k_BNS, v_BNE, ids_BN, min(chunk_size, v_BNE.shape[1]), chunks)
    return clear_padding(o_BNE, segment_ids_BN)


def _reference(q, k, v, ids_BN, size, chunks):
    """Chooses for every query by itself, among the chunks as its document sees them."""
    n, dtype = v.shape[1], jnp.promote_types(q.dtype, jnp.float32)
    groups = -(-n // size)
    chunk_N, chunk_I = jnp.arange(n) // size, jnp.arange(groups)
    same_BNM = visibility_mask(ids_BN, ids_BN, n=n, m=n, causal=False)
    member_BNMI = same_BNM[..., None] & (chunk_N[:, None] == chunk_I)
    tokens_BNI = member_BNMI.sum(2)

    def means(x_BMS):
        sums = jnp.einsum('BNMI,BMS->BNIS', member_BNMI.astype(dtype), x_BMS.astype(dtype))
        return sums / jnp.maximum(tokens_BNI, 1)[..., None]

    before_N1 = chunk_N[:, None] - 1
    query_BNS = jnp.einsum('BNIS,NI->BNS', means(q), (chunk_I == before_N1).astype(dtype))
    k_BNIS = means(k)
    fit_BNI = jnp.einsum('BNS,BNIS->BNI', query_BNS, k_BNIS)
    index_BNi, found_BNi = best_chunks(fit_BNI, chunk_I == before_N1, (chunk_I <= before_N1) & (tokens_BNI > 0), chunks)
    chosen_BNI = ((index_BNi[..., None] == chunk_I) & found_BNi[..., None]).any(2)
    mask_BNM = (member_BNMI & chosen_BNI[:, :, None]).any(-1)
    scores_BNM = jnp.einsum('BNS,BMS->BNM', q, k, preferred_element_type=dtype)
    scores_BNM += jnp.einsum('BNS,BNIS->BNI', q.astype(dtype), k_BNIS)[:, :, chunk_N]
    return far_weights(scores_BNM, mask_BNM, q.shape[-1]).astype(v.dtype) @ v


def _chunked(q, k, v, ids_BN, size, chunks):
    """The same, once for all queries of a chunk, from the document that its first token continues."""
    n = v.shape[1]
    q_BGCS, k_BGCS, v_BGCE, ids_BGC = (into_chunks(x, size) for x in (q, k, v, ids_BN))
    chunks = min(chunks, v_BGCE.shape[1] - 1)
    if not chunks:
        return jnp.zeros_like(v)
    o_BGCE = jax.checkpoint(_attend, static_argnums=(4,))(q_BGCS, k_BGCS, v_BGCE, ids_BGC, chunks)
    return o_BGCE.reshape(v.shape[0], -1, v.shape[-1])[:, :n]


def _attend(q_BGCS, k_BGCS, v_BGCE, ids_BGC, chunks):
    """Returns what the queries of every chunk read, [B, G, C, E]."""
    dtype = jnp.promote_types(q_BGCS.dtype, jnp.float32)
    k_BGCS, index_BGi, found_BGi = choose_chunks(q_BGCS, k_BGCS, ids_BGC, chunks)

    def taken(x_BICS):
        x_BGiCS = _take(x_BICS, index_BGi)
        return x_BGiCS.reshape(*x_BGiCS.shape[:2], -1, *x_BGiCS.shape[4:])

    k_BGMS = taken(k_BGCS)
    ids_BGM = jnp.where(jnp.repeat(found_BGi, ids_BGC.shape[-1], axis=-1), taken(ids_BGC), 0)
    mask_BGCM = visibility_mask(ids_BGC, ids_BGM, n=ids_BGC.shape[-1], m=ids_BGM.shape[-1], causal=False)
    scores_BGCM = jnp.einsum('BGCS,BGMS->BGCM', q_BGCS, k_BGMS, preferred_element_type=dtype)
    return far_weights(scores_BGCM, mask_BGCM, q_BGCS.shape[-1]).astype(v_BGCE.dtype) @ taken(v_BGCE)


def choose_chunks(q_BGCS: Array, k_BGCS: Array, ids_BGC: Array, chunks: int) -> tuple[Array, Array, Array]:
    """Returns k[s] + mean(k of its chunk), which chunks each chunk reads, and in which of these places there is one.

    Args:
      q_BGCS: queries, 0 at padding.
      k_BGCS: keys, 0 at padding.
      ids_BGC: segment ids, of documents that are contiguous.
      chunks: i, how many chunks are read, at most G.

    Returns:
      Keys [B, G, C, S] in the type of k, which have a gradient; index [B, G, i], int32, and found [B, G, i], bool, of
      each chunk the places where it is true first.
    """
    dtype, groups = jnp.promote_types(q_BGCS.dtype, jnp.float32), q_BGCS.shape[1]
    first_BG, last_BG = first_and_last_document(ids_BGC)
    # Later chunks can only go on with the document that is open at a chunk's end.
    tail_BGC = (ids_BGC == last_BG[..., None]) & (ids_BGC > 0)

    def means(x_BGCS):
        sums = jnp.einsum('BGC,BGCS->BGS', tail_BGC.astype(x_BGCS.dtype), x_BGCS, preferred_element_type=dtype)
        return sums / jnp.maximum(tail_BGC.sum(-1), 1)[..., None]

    k_BIS, group_I = means(k_BGCS), jnp.arange(groups)
    query_BGS = jnp.pad(means(q_BGCS), ((0, 0), (1, 0), (0, 0)))[:, :-1]
    fit_BGI = jnp.einsum('BGS,BIS->BGI', query_BGS, k_BIS)
    before_G1 = group_I[:, None] - 1
    same_BGI = (first_BG[:, :, None] == last_BG[:, None]) & (last_BG > 0)[:, None]
    places = best_chunks(fit_BGI, group_I == before_G1, (group_I <= before_G1) & same_BGI, chunks)
    return (k_BGCS + k_BIS[:, :, None]).astype(k_BGCS.dtype), *places


def best_chunks(fit: Array, before: Array, candidate: Array, chunks: int) -> tuple[Array, Array]:
    """Returns which chunks are read, [..., i], and whether there is one at all in each of these places.

    Args:
      fit: how well each chunk fits, [..., I].
      before: whether it is the chunk before, which is always read.
      candidate: whether it may be read.
      chunks: how many are read, at most.
    """
    fit = jax.lax.stop_gradient(jnp.where(candidate, jnp.where(before, jnp.inf, fit), -jnp.inf))
    best, index = jax.lax.top_k(fit, min(chunks, fit.shape[-1]))
    return index, best > -jnp.inf


def far_weights(scores: Array, mask: Array, width: int) -> Array:
    """Returns w / (1 + sum of w) where the mask allows, 0 elsewhere, of q.k [..., N, M]."""
    scores = jnp.where(mask, scores * width**-0.5, LOWEST)
    # Over the largest of all terms, of which the 1 is one.
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), 0))
    weights = jnp.exp(scores - top)
    return weights / (jnp.exp(-top) + weights.sum(-1, keepdims=True))


@jax.custom_vjp
def _take(x_BICS: Array, index_BGi: Array) -> Array:
    """Returns the chunks of these indices, [B, G, i, C, S]."""
    return jax.vmap(lambda x_ICS, index_Gi: x_ICS.at[index_Gi].get(mode='promise_in_bounds'))(x_BICS, index_BGi)


def _take_forward(x_BICS, index_BGi):
    return _take(x_BICS, index_BGi), (index_BGi, x_BICS.shape[1])


def _take_backward(residuals, dx_BGiCS):
    # A matmul, which adds in a fixed order: a scatter of bfloat16 is slow on a GPU, and never twice the same.
    index_BGi, groups = residuals
    chosen_BGiI = jax.nn.one_hot(index_BGi, groups, dtype=dx_BGiCS.dtype)
    return jnp.einsum('BGiI,BGiCS->BICS', chosen_BGiI, dx_BGiCS, precision='highest'), None


_take.defvjp(_take_forward, _take_backward)
