"""Performer's linear attention: a kernel phi(q).phi(k) in place of exp(q.k), so that keys can be summed first.

    out[t] = phi(q[t]) . sum(phi(k) v^T) / phi(q[t]) . sum(phi(k))      over the tokens t sees

Two feature maps (Choromanski et al. 2021): the ReLU kernel, and FAVOR+, positive orthogonal random features whose
product estimates exp(q.k / sqrt(K)) without bias.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gau.ops.chunk_states import into_chunks, states_of_other_chunks
from gau.ops.masks import clear_padding, visibility_mask

CHUNK = 128
RELU_OFFSET = 1e-3


def relu_features(x: Array) -> Array:
    """relu(x) + 0.001: positive, so that a denominator is never 0."""
    return jax.nn.relu(x) + RELU_OFFSET


def orthogonal_directions(features: int, width: int, heads: int) -> np.ndarray:
    """Returns FAVOR+'s random directions [H, M, K], float32: orthogonal in blocks of K, as long as Gaussian vectors.

    Drawn by NumPy from a fixed seed: the same in every process and every run, a constant of the program and neither a
    parameter nor part of a checkpoint.
    """
    generator = np.random.default_rng(20210302)
    blocks = -(-features // width)
    q, r = np.linalg.qr(generator.standard_normal((heads, blocks, width, width)))
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    rows = q.swapaxes(-1, -2).reshape(heads, blocks * width, width)[:, :features]
    lengths = np.linalg.norm(generator.standard_normal((heads, features, width)), axis=-1)
    return (rows * lengths[..., None]).astype(np.float32)


def favor_features(x_BNK: Array, w_MK: Array, *, is_query: bool) -> Array:
    """Returns exp(w.x - |x|^2 / 2), up to a factor that the quotient of `linear_attention` cancels, [B, N, M].

    x is scaled by K^(-1/4) first. The factor of a query is its own largest exponent. That of the keys is one constant:
    a maximum over keys, as it is often seen, would let later tokens touch earlier ones. With it the exponent is at most
    (|w|^2 - K) / 2, which float32 holds.
    """
    dtype = jnp.promote_types(x_BNK.dtype, jnp.float32)
    width = x_BNK.shape[-1]
    x_BNK = x_BNK.astype(dtype) * width**-0.25
    exponent = x_BNK @ w_MK.T.astype(dtype)
    if is_query:
        return jnp.exp(exponent - jax.lax.stop_gradient(exponent.max(-1, keepdims=True)))
    return jnp.exp(exponent - jnp.square(x_BNK).sum(-1, keepdims=True) / 2 - width / 2)


def linear_attention(
    q_BNM: Array,
    k_BNM: Array,
    v_BNK: Array,
    *,
    causal: bool,
    segment_ids_BN: Array | None = None,
    impl: str = 'xla',
) -> Array:
    """Returns the quotient above for one head.

    Args:
      q_BNM: features phi(q), non-negative.
      k_BNM: features phi(k), non-negative.
      v_BNK: values.
      causal: whether keys after the query are hidden.
      segment_ids_BN: documents and padding, or None.
      impl: 'reference' forms the N x N matrix; 'xla' is linear in N and asks that documents are contiguous.

    Returns:
      [B, N, K] in the dtype of v; zeros at padding and where the denominator vanishes.
    """
    q_BNM, k_BNM, v_BNK = (clear_padding(x, segment_ids_BN) for x in (q_BNM, k_BNM, v_BNK))
    dtype = jnp.promote_types(v_BNK.dtype, jnp.float32)
    # A value of 1 beside the others sums up to the denominator.
    ones = clear_padding(jnp.ones((*v_BNK.shape[:2], 1), v_BNK.dtype), segment_ids_BN)
    v_BNL = jnp.concatenate([v_BNK, ones], axis=-1).astype(dtype)
    q_BNM, k_BNM = q_BNM.astype(dtype), k_BNM.astype(dtype)
    attend = _reference if impl == 'reference' else _chunked
    o_BNL = attend(q_BNM, k_BNM, v_BNL, causal, segment_ids_BN)
    denominator = o_BNL[..., -1:]
    safe = jnp.where(denominator > 0, denominator, 1)
    o_BNK = jnp.where(denominator > 0, o_BNL[..., :-1] / safe, 0).astype(v_BNK.dtype)
    return clear_padding(o_BNK, segment_ids_BN)


def _reference(q, k, v, causal, segment_ids_BN):
    mask_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=q.shape[1], m=q.shape[1], causal=causal)
    a_BNN = jnp.einsum('BNM,BTM->BNT', q, k)
    return (a_BNN if mask_BNN is None else jnp.where(mask_BNN, a_BNN, 0)) @ v


def _chunked(q, k, v, causal, segment_ids_BN):
    n = q.shape[1]
    if segment_ids_BN is None and not causal:
        return q @ jnp.einsum('BNM,BNL->BML', k, v)
    size = min(CHUNK, n)
    # Zeros that fill the last chunk weigh nothing: they stand after every token, and their values are 0.
    ids_BN = jnp.ones((1, n), jnp.int32) if segment_ids_BN is None else segment_ids_BN
    ids_BGC, q, k, v = (into_chunks(x, size) for x in (ids_BN, q, k, v))
    mask_BGCC = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=causal)
    o_BGCL = jnp.where(mask_BGCC, jnp.einsum('BGCM,BGTM->BGCT', q, k), 0) @ v
    for seen in states_of_other_chunks(k, v, ids_BGC, causal=causal):
        o_BGCL += jnp.where(seen.sees_BGC[..., None], q, 0) @ seen.state_BGSE
    return o_BGCL.reshape(q.shape[0], -1, v.shape[-1])[:, :n]
