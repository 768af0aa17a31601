"""Performer's linear attention: a kernel phi(q).phi(k) in place of exp(q.k), so that keys can be summed first.

    out[t] = phi(q[t]) . sum(phi(k) v^T) / phi(q[t]) . sum(phi(k))      over the tokens t sees

Two feature maps (Choromanski et al. 2021): the ReLU kernel, and FAVOR+, positive orthogonal random features whose
product estimates exp(q.k / sqrt(K)) without bias. The latter need more range than float32 has, so that each key comes
as features of order 1 and the logarithm of a factor.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gau.ops.chunk_states import LOWEST, into_chunks, relative_weights, states_of_other_chunks
from gau.ops.masks import clear_padding, visibility_mask
from gau.ops.tracing import choose

CHUNK = 128
RELU_OFFSET = 1e-3


def relu_features(x: Array) -> Array:
    """relu(x) + 0.001: positive, so that a denominator is never 0."""
    return jax.nn.relu(x) + RELU_OFFSET


def orthogonal_directions(features: int, width: int, heads: int) -> np.ndarray:
    """Returns FAVOR+'s random directions [H, F, K], float32: orthogonal in blocks of K, as long as Gaussian vectors.

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


def favor_features(x_BNK: Array, w_FK: Array) -> tuple[Array, Array]:
    """Returns phi(x) = exp(w.x - |x|^2 / 2) as features [B, N, F], the largest of a token 1, and a log-scale [B, N].

    phi(x) = features exp(log_scale). x is scaled by K^(-1/4) first. At K = 256 |x|^2 / 2 is 8 for keys of N(0, 1) and
    72 for ones three times as large, and differs from key to key: phi leaves float32's range, whatever the constant
    factor. A query's factor cancels in the quotient; keys are summed with theirs (`linear_attention`).
    The factors are taken as constants: the quotient does not depend on how phi is split.
    """
    dtype = jnp.promote_types(x_BNK.dtype, jnp.float32)
    x_BNK = x_BNK.astype(dtype) * x_BNK.shape[-1] ** -0.25
    exponent = x_BNK @ w_FK.T.astype(dtype) - jnp.square(x_BNK).sum(-1, keepdims=True) / 2
    log_scale_BN1 = jax.lax.stop_gradient(exponent.max(-1, keepdims=True))
    return jnp.exp(exponent - log_scale_BN1), log_scale_BN1[..., 0]


def quotient(o_BNL: Array) -> Array:
    """Returns the sums over values divided by the last, the denominator; zeros where that is 0.

    Both are scaled by a constant first, so that the gradient never has the square of a small denominator in it.
    """
    denominator = jax.lax.stop_gradient(o_BNL[..., -1:])
    o_BNL = jnp.where(denominator > 0, o_BNL, 1) / jnp.where(denominator > 0, denominator, 1)
    return jnp.where(denominator > 0, o_BNL[..., :-1] / o_BNL[..., -1:], 0)


def linear_attention(
    q_BNF: Array,
    k_BNF: Array,
    v_BNK: Array,
    *,
    causal: bool,
    key_log_scale_BN: Array | None = None,
    segment_ids_BN: Array | None = None,
    impl: str = 'xla',
) -> Array:
    """Returns the quotient above for one head.

    Args:
      q_BNF: features phi(q), non-negative.
      k_BNF: features phi(k), non-negative.
      v_BNK: values.
      causal: whether keys after the query are hidden.
      key_log_scale_BN: the features of a key are to be multiplied by exp of this, a constant; None: by 1. Only the
        keys that a query sees decide by what they are scaled down.
      segment_ids_BN: documents and padding, or None.
      impl: 'reference' forms the N x N matrix; 'xla' is linear in N and asks that documents are contiguous.

    Returns:
      [B, N, K] in the dtype of v; zeros at padding and where the denominator vanishes.
    """
    q_BNF, k_BNF, v_BNK = (clear_padding(x, segment_ids_BN) for x in (q_BNF, k_BNF, v_BNK))
    dtype = jnp.promote_types(v_BNK.dtype, jnp.float32)
    # A value of 1 beside the others sums up to the denominator.
    ones = clear_padding(jnp.ones((*v_BNK.shape[:2], 1), v_BNK.dtype), segment_ids_BN)
    v_BNL = jnp.concatenate([v_BNK, ones], axis=-1).astype(dtype)
    q_BNF, k_BNF = q_BNF.astype(dtype), k_BNF.astype(dtype)
    attend = choose(impl, {'reference': _reference, 'xla': _chunked})
    o_BNL = attend(q_BNF, k_BNF, v_BNL, key_log_scale_BN, causal, segment_ids_BN)
    return clear_padding(quotient(o_BNL).astype(v_BNK.dtype), segment_ids_BN)


# These return the sums of every query over a positive factor of its own, which the quotient cancels.


def _reference(q, k, v, log_scale_BN, causal, segment_ids_BN):
    n = q.shape[1]
    mask_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=n, m=n, causal=causal)
    return _masked(jnp.einsum('BNF,BMF->BNM', q, k), mask_BNN, log_scale_BN)[0] @ v


def _masked(a_BNM, mask_BNM, log_scale_BM):
    """The matrix with its keys' factors over the largest that the query sees, and the logarithm of that [B, N]."""
    if log_scale_BM is None:
        return a_BNM if mask_BNM is None else jnp.where(mask_BNM, a_BNM, 0), None
    sees = jnp.ones(a_BNM.shape, bool) if mask_BNM is None else mask_BNM
    weights_BNM, top_BN = relative_weights(sees, log_scale_BM[..., None, :], a_BNM.dtype)
    return jnp.where(sees, a_BNM * weights_BNM, 0), top_BN


def _chunked(q, k, v, log_scale_BN, causal, segment_ids_BN):
    n = q.shape[1]
    if segment_ids_BN is None and not causal:
        if log_scale_BN is not None:
            k = k * jnp.exp(log_scale_BN - log_scale_BN.max(-1, keepdims=True))[..., None]
        return q @ jnp.einsum('BNF,BNL->BFL', k, v)
    size = min(CHUNK, n)
    # Zeros that fill the last chunk weigh nothing: they stand after every token, and their values are 0.
    ids_BN = jnp.ones((1, n), jnp.int32) if segment_ids_BN is None else segment_ids_BN
    ids_BGC, q, k, v = (into_chunks(x, size) for x in (ids_BN, q, k, v))
    log_scale_BGC = None if log_scale_BN is None else into_chunks(log_scale_BN, size)
    mask_BGCC = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=causal)
    a_BGCC, top_BGC = _masked(jnp.einsum('BGCF,BGMF->BGCM', q, k), mask_BGCC, log_scale_BGC)
    o_BGCL = a_BGCC @ v
    for seen in states_of_other_chunks(k, v, ids_BGC, causal=causal, log_scale_BGC=log_scale_BGC):
        far_BGCL = jnp.where(seen.sees_BGC[..., None], q, 0) @ seen.state_BGSE
        if log_scale_BN is None:
            o_BGCL += far_BGCL
        else:
            far_BGC = jnp.where(seen.sees_BGC, seen.log_scale_BG[..., None], LOWEST)
            before_BGC, top_BGC = top_BGC, jnp.maximum(top_BGC, far_BGC)
            o_BGCL *= jnp.exp(before_BGC - top_BGC)[..., None]
            o_BGCL += far_BGCL * jnp.exp(far_BGC - top_BGC)[..., None]
    return o_BGCL.reshape(q.shape[0], -1, v.shape[-1])[:, :n]
