"""Quadratic attention: every query against every key it sees. GAU's A V (docs/paper.md section 1) and softmax."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding, document_length, visibility_mask
from gau.ops.scores import Scoring, attention_weights

QUERY_BLOCK = 512


def quadratic_attention(
    q_BNS: Array,
    k_BNS: Array,
    v_BNE: Array,
    *,
    scoring: Scoring,
    causal: bool,
    segment_ids_BN: Array | None = None,
    bias_NN: Array | None = None,
    impl: str = 'reference',
    sequence_axis: str | None = None,
) -> Array:
    """Returns A V for one head, A = f(q k^T / n + b) over the visible keys.

    Args:
      q_BNS: queries.
      k_BNS: keys.
      v_BNE: values.
      scoring: attention function and normaliser.
      causal: whether keys after the query are hidden.
      segment_ids_BN: documents and padding, or None.
      bias_NN: relative position bias, or None.
      impl: 'reference' holds the [B, N, N] matrix at once; 'xla' computes it a block of queries at a time and again in
        the backward pass, so that what it keeps itself grows with N and not with its square. A bias, which comes whole,
        is still N x N.
      sequence_axis: mesh axis over whose devices the tokens are spread in order, where this runs inside
        `jax.shard_map`; N is then the tokens of one device, but for `bias_NN`, which has this device's rows of all
        columns. Keys and values of all devices are gathered.

    Returns:
      [B, N, E] in the dtype of v; zeros at padding.
    """
    n = q_BNS.shape[1]
    q_BNS, k_BMS, v_BME = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    ids_BM, offset = segment_ids_BN, 0
    if sequence_axis is not None:
        k_BMS, v_BME, ids_BM = jax.tree.map(
            lambda x: jax.lax.all_gather(x, sequence_axis, axis=1, tiled=True), (k_BMS, v_BME, ids_BM)
        )
        offset = n * jax.lax.axis_index(sequence_axis)
    m = k_BMS.shape[1]
    if segment_ids_BN is None:
        length_BN1 = jnp.full((1, n, 1), m, jnp.int32)
    else:
        length_BN1 = document_length(segment_ids_BN, ids_BM)[..., None]

    def attend(q_BnS, ids_Bn, length_Bn1, bias_nM, first):
        mask_BnM = visibility_mask(ids_Bn, ids_BM, n=q_BnS.shape[1], m=m, causal=causal, first_query=offset + first)
        a_BnM = attention_weights(
            q_BnS, k_BMS, scoring=scoring, sequence_length=length_Bn1, mask=mask_BnM, bias=bias_nM
        )
        return a_BnM.astype(v_BME.dtype) @ v_BME

    if impl == 'reference' or n <= 2 * QUERY_BLOCK:
        o_BNE = attend(q_BNS, segment_ids_BN, length_BN1, bias_NN, 0)
    else:
        o_BNE = _by_query_blocks(attend, q_BNS, segment_ids_BN, length_BN1, bias_NN)
    return clear_padding(o_BNE, segment_ids_BN)


def _by_query_blocks(attend, q_BNS, segment_ids_BN, length_BN1, bias_NN):
    """Runs `attend` over blocks of queries in a scan; what a block computes is recomputed in the backward pass."""
    n = q_BNS.shape[1]
    blocks = -(-n // QUERY_BLOCK)

    def split(x, axis):
        if x is None:
            return None
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * QUERY_BLOCK - n)
        x = jnp.pad(x, padding)
        x = x.reshape((*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :]))
        return jnp.moveaxis(x, axis, 0)

    def body(_, xs):
        return None, attend(*xs)

    xs = (
        split(q_BNS, 1),
        split(segment_ids_BN, 1),
        split(length_BN1, 1),
        split(bias_NN, 0),
        jnp.arange(blocks) * QUERY_BLOCK,
    )
    o_gBnE = jax.lax.scan(jax.checkpoint(body), None, xs)[1]
    return jnp.moveaxis(o_gBnE, 0, 1).reshape(q_BNS.shape[0], blocks * QUERY_BLOCK, -1)[:, :n]
