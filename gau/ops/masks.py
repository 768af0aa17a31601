"""Who sees whom: causality, padding and packed documents."""

import jax.numpy as jnp
from jax import Array


def visibility_mask(
    query_ids_BN: Array | None, key_ids_BM: Array | None, *, n: int, m: int, causal: bool, first_query: int | Array = 0
) -> Array | None:
    """Returns which keys each query sees, bool [B, N, M] (or [1, N, M], or None when every query sees every key).

    A query sees a key of its own document that is not padding and, if `causal`, does not stand after it.

    Args:
      query_ids_BN: segment ids of the queries, or None for one document without padding.
      key_ids_BM: segment ids of the keys, None exactly when `query_ids_BN` is.
      n: number of queries.
      m: number of keys.
      causal: whether keys after the query are hidden.
      first_query: index of the first query among the keys (used when queries are taken a block at a time).
    """
    mask = None
    if query_ids_BN is not None:
        mask = (query_ids_BN[..., :, None] == key_ids_BM[..., None, :]) & (key_ids_BM > 0)[..., None, :]
    if causal:
        lower = jnp.arange(m) <= (first_query + jnp.arange(n))[:, None]
        mask = lower[None] if mask is None else mask & lower
    return mask


def clear_padding(x: Array, segment_ids_BN: Array | None, *, token_axis: int = 1) -> Array:
    """Returns x with zeros at padding tokens; nothing that stood there, NaN included, reaches a value or a gradient.

    Args:
      x: [B, ..., N, ...] with the tokens on `token_axis`.
      segment_ids_BN: segment ids, or None: x is returned as it is.
      token_axis: axis of x that holds the tokens.
    """
    if segment_ids_BN is None:
        return x
    ids = segment_ids_BN.reshape(
        segment_ids_BN.shape[:1] + (1,) * (token_axis - 1) + segment_ids_BN.shape[1:] + (1,) * (x.ndim - token_axis - 1)
    )
    return jnp.where(ids > 0, x, jnp.zeros((), x.dtype))


def document_length(segment_ids_BN: Array, all_ids_BM: Array | None = None) -> Array:
    """Returns for every token the number of tokens of its document, int32 [B, N]; 0 at padding.

    Args:
      segment_ids_BN: segment ids of the tokens.
      all_ids_BM: those among which to count, where the tokens are a part of a sequence; None: the same.
    """
    ids_BM = segment_ids_BN if all_ids_BM is None else all_ids_BM
    same = visibility_mask(segment_ids_BN, ids_BM, n=segment_ids_BN.shape[1], m=ids_BM.shape[1], causal=False)
    return jnp.where(segment_ids_BN > 0, same.sum(-1, dtype=jnp.int32), 0)


def visible_keys(segment_ids_BN: Array, *, causal: bool) -> Array:
    """Returns how many keys each token sees: those of its document, if `causal` up to itself; int32 [B, N]."""
    if not causal:
        return document_length(segment_ids_BN)
    n = segment_ids_BN.shape[1]
    mask_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=n, m=n, causal=True)
    return jnp.where(segment_ids_BN > 0, mask_BNN.sum(-1, dtype=jnp.int32), 0)
