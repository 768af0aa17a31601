"""Softmax attention by cuDNN's fused kernels: N x N scores exist in the chip's registers only.

`jax.nn.dot_product_attention` offers cuDNN no packed documents: it takes one length per sequence, or a mask of
[B, 1, N, N], whose gradient, as large and of no use, its backward pass computes as well. So documents are told apart in
q.k itself. Each has a code of +-1s, one for every bit of N. Queries and keys carry their document's code in columns
of their own, times a constant, and one column more subtracts the code's dot product with itself. These columns add
nothing to a score within a document. To a score between two documents they add -2 SEPARATION = -512 for every bit that
differs: its weight is then 0 in float32, unless it were higher by some 400 than all that the query should see.

So memory stays linear in N. The cost is a multiple of 8 columns, 16 for lengths from 129 to 32,768 (heads of 64 become
heads of 80), in queries, keys and values. A matmul that sums from first to last has an exact sum of the columns, which
stand first; another order takes sums of up to 10^4 in float32 on the way, an absolute error of up to 5e-4 in a score.
Rounding the weights to bfloat16 is an error four times that.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding

# Half of what one differing bit takes from a score, at least, in nats.
SEPARATION = 256
# Columns come in multiples of this.
ALIGNMENT = 8


def cudnn_attention(
    q_BNHK: Array,
    k_BNHK: Array,
    v_BNHK: Array,
    *,
    causal: bool,
    segment_ids_BN: Array | None = None,
    implementation: str = 'cudnn',
) -> Array:
    """Returns softmax(q k^T / sqrt(K)) v over the visible keys of every head.

    Args:
      q_BNHK: queries, bfloat16.
      k_BNHK: keys.
      v_BNHK: values.
      causal: whether keys after the query are hidden.
      segment_ids_BN: documents and padding, or None.
      implementation: 'cudnn', or 'xla' to compute the same without a GPU (slowly, in any float type; for tests).

    Returns:
      [B, N, H, K] in the dtype of v; zeros at padding.
    """
    n, width = q_BNHK.shape[1], q_BNHK.shape[-1]
    if n % 2:
        # cuDNN has no gradient for an odd number of tokens, so one more is put last. There no causal query sees it;
        # without causality it is padding.
        if segment_ids_BN is None and not causal:
            segment_ids_BN = jnp.ones(q_BNHK.shape[:2], jnp.int32)
        *x_BMHK, ids_BM = (
            None if x is None else jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
            for x in (q_BNHK, k_BNHK, v_BNHK, segment_ids_BN)
        )
        fields = {'causal': causal, 'segment_ids_BN': ids_BM, 'implementation': implementation}
        return cudnn_attention(*x_BMHK, **fields)[:, :n]
    if segment_ids_BN is not None:
        q_BNHK, k_BNHK, v_BNHK = (clear_padding(x, segment_ids_BN) for x in (q_BNHK, k_BNHK, v_BNHK))
        q_BNX, k_BNX = document_columns(segment_ids_BN)
        # A power of two, so that bfloat16 holds the columns exactly.
        size = 2.0 ** math.ceil(math.log2(SEPARATION * width**0.5) / 2)
        q_BNHK, k_BNHK = _prepend(size * q_BNX, q_BNHK), _prepend(size * k_BNX, k_BNHK)
        # Values must be as wide as keys.
        v_BNHK = _prepend(jnp.zeros_like(k_BNX), v_BNHK)
    o_BNHK = jax.nn.dot_product_attention(
        q_BNHK, k_BNHK, v_BNHK, scale=width**-0.5, is_causal=causal, implementation=implementation
    )
    return clear_padding(o_BNHK[..., -width:], segment_ids_BN)


def document_columns(segment_ids_BN: Array) -> tuple[Array, Array]:
    """Returns columns for queries and keys, float32 [B, N, X] of small integers.

    The dot product of a query's and a key's is 0 where their segment ids are equal, and -2 or less where they differ.
    """
    n = segment_ids_BN.shape[1]
    # How many tokens of the row have a lesser id: below N, and a number of its own for every id.
    rank_BN = jax.vmap(jnp.searchsorted)(jnp.sort(segment_ids_BN, axis=1), segment_ids_BN)
    bits = max(n - 1, 1).bit_length()
    code_BNX = (2 * ((rank_BN[..., None] >> jnp.arange(bits)) & 1) - 1).astype(jnp.float32)
    one_BN1 = jnp.ones_like(code_BNX[..., :1])
    unused = -(bits + 1) % ALIGNMENT

    def columns(last_BN1):
        return jnp.pad(jnp.concatenate([code_BNX, last_BN1], axis=-1), ((0, 0), (0, 0), (0, unused)))

    return columns(one_BN1), columns(-bits * one_BN1)


def _prepend(columns_BNX: Array, x_BNHK: Array) -> Array:
    shape = (*x_BNHK.shape[:-1], columns_BNX.shape[-1])
    columns_BNHX = jnp.broadcast_to(columns_BNX[:, :, None], shape)
    return jnp.concatenate([columns_BNHX.astype(x_BNHK.dtype), x_BNHK], axis=-1)
