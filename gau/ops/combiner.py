"""Combiner, axial and row-major (Ren et al. 2021; our reading, docs/paper.md section 4 marks the choice as recalled).

The sequence is laid out in rows of C tokens. A query in row r sees

  * the tokens of its own row (up to itself, if causal) each for itself, and
  * for each of the C columns one summary of that column's tokens in the other rows (the earlier ones, if causal).

A summary of a set of tokens has as key the mean of their keys, and as value their values weighted by
softmax(mean of their queries . key / sqrt(K)). One softmax runs over the row's tokens and the C summaries, so that the
attention is a probability over all tokens, factorised through the columns. The paper summarises by a pooling with a
small network; ours has no parameters, so that a Combiner has exactly a Transformer's. Cost O(N (C + N/C)): with
C = sqrt(N), O(N^1.5).
"""

import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import first_and_last_document, into_chunks
from gau.ops.masks import clear_padding, visibility_mask
from gau.ops.scores import masked_softmax


def combiner_attention(
    q_BNK: Array,
    k_BNK: Array,
    v_BNK: Array,
    *,
    row_length: int,
    causal: bool,
    segment_ids_BN: Array | None = None,
) -> Array:
    """Returns the attention above for one head, [B, N, K] in the dtype of v; zeros at padding.

    Args:
      q_BNK: queries.
      k_BNK: keys.
      v_BNK: values.
      row_length: C; N need not be a multiple of it.
      causal: whether later tokens are hidden.
      segment_ids_BN: documents (contiguous) and padding, or None. A summary holds tokens of one document only.
    """
    n = q_BNK.shape[1]
    dtype = jnp.promote_types(q_BNK.dtype, jnp.float32)
    q_BNK, k_BNK, v_BNK = (clear_padding(x, segment_ids_BN) for x in (q_BNK, k_BNK, v_BNK))
    ids_BN = jnp.ones((1, n), jnp.int32) if segment_ids_BN is None else segment_ids_BN
    ids, q, k, v = (into_chunks(x, min(row_length, n)) for x in (ids_BN, q_BNK, k_BNK, v_BNK))
    size, scale = ids.shape[2], q.shape[-1] ** -0.5

    row_mask = visibility_mask(ids, ids, n=size, m=size, causal=causal)
    scores = [jnp.einsum('BGCK,BGMK->BGCM', q, k, preferred_element_type=dtype) * scale]
    masks = [jnp.broadcast_to(row_mask, scores[0].shape)]
    values = [v]

    # Other rows hold tokens of the document at this row's head (earlier rows) or at its tail (later rows), no others.
    head_BG, tail_BG = first_and_last_document(ids)
    in_head_BGC = (ids == head_BG[..., None]) & (ids > 0)
    in_tail_BGC = (ids == tail_BG[..., None]) & (ids > 0) & ~in_head_BGC
    documents = [(head_BG, in_head_BGC)]
    if not causal and segment_ids_BN is not None:
        documents.append((tail_BG, in_tail_BGC))
    for document_BG, sees_BGC in documents:
        key, value, exists_BGC = _column_summaries(q, k, v, ids, document_BG, scale=scale, causal=causal)
        scores.append(jnp.einsum('BGCK,BGMK->BGCM', q, key, preferred_element_type=dtype) * scale)
        masks.append(jnp.broadcast_to(sees_BGC[..., :, None] & exists_BGC[..., None, :], scores[0].shape))
        values.append(value)

    weights = masked_softmax(jnp.concatenate(scores, axis=-1), jnp.concatenate(masks, axis=-1))
    o_BGCK = weights.astype(v.dtype) @ jnp.concatenate(values, axis=-2)
    return clear_padding(o_BGCK.reshape(q_BNK.shape[0], -1, v.shape[-1])[:, :n], segment_ids_BN)


def _column_summaries(q, k, v, ids_BGC, document_BG, *, scale, causal):
    """Returns key and value of every row's C column summaries, [B, G, C, K], and whether the columns hold anything."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    rows = jnp.arange(ids_BGC.shape[1])
    other_GI = rows[:, None] > rows if causal else rows[:, None] != rows
    # member[g, c, h]: the token in row h and column c belongs to the summary of column c that row g reads.
    ids_B1CI = ids_BGC.swapaxes(1, 2)[:, None]
    member_BGCI = (ids_B1CI == document_BG[:, :, None, None]) & (ids_B1CI > 0) & other_GI[:, None]
    member_BGCI = jnp.broadcast_to(member_BGCI, (q.shape[0], *member_BGCI.shape[1:]))
    weights = member_BGCI / jnp.maximum(member_BGCI.sum(-1, keepdims=True), 1)
    weights = weights.astype(q.dtype)
    mean_q, mean_k = (
        jnp.einsum('BGCI,BICK->BGCK', weights, x, preferred_element_type=dtype).astype(x.dtype) for x in (q, k)
    )
    scores_BGCI = jnp.einsum('BGCK,BICK->BGCI', mean_q, k, preferred_element_type=dtype) * scale
    weights = masked_softmax(scores_BGCI, member_BGCI).astype(v.dtype)
    return mean_k, jnp.einsum('BGCI,BICK->BGCK', weights, v), member_BGCI.any(-1)
