"""Linformer (Wang et al. 2020): keys and values projected along the sequence from N tokens to R slots.

    out = softmax(Q (E K)^T / sqrt(K)) (F V)

A slot mixes the whole sequence, so there is no causal form. Documents packed together are projected each for itself,
by the position within the document: then packing changes nothing.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding, visibility_mask


def linformer_attention(
    q_BNK: Array,
    k_BNK: Array,
    v_BNK: Array,
    e_BNR: Array,
    f_BNR: Array,
    *,
    segment_ids_BN: Array | None = None,
    impl: str = 'xla',
) -> Array:
    """Returns the formula above for one head, [B, N, K] in the dtype of v; zeros at padding.

    Args:
      q_BNK: queries.
      k_BNK: keys.
      v_BNK: values.
      e_BNR: for every token the weights by which its key enters the R slots, [B, N, R] or [1, N, R].
      f_BNR: the same for its value.
      segment_ids_BN: documents and padding, or None.
      impl: 'xla' projects first and is linear in N. With segment ids it is 'reference': there the slots differ from
        document to document and the products are masked in an N x N form, which costs what full attention costs.
    """
    dtype = jnp.promote_types(q_BNK.dtype, jnp.float32)
    q_BNK, k_BNK, v_BNK = (clear_padding(x, segment_ids_BN) for x in (q_BNK, k_BNK, v_BNK))
    scale = q_BNK.shape[-1] ** -0.5
    if impl == 'xla' and segment_ids_BN is None:
        slots_k, slots_v = (_project(weights, x) for weights, x in ((e_BNR, k_BNK), (f_BNR, v_BNK)))
        scores_BNR = jnp.einsum('BNK,BRK->BNR', q_BNK, slots_k, preferred_element_type=dtype) * scale
        return jax.nn.softmax(scores_BNR, axis=-1).astype(v_BNK.dtype) @ slots_v

    n = q_BNK.shape[1]
    mask_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=n, m=n, causal=False)
    mask_BNN = jnp.ones((1, n, n), bool) if mask_BNN is None else mask_BNN
    products_BNN = jnp.einsum('BNK,BMK->BNM', q_BNK, k_BNK, preferred_element_type=dtype)
    scores_BNR = jnp.where(mask_BNN, products_BNN, 0) @ e_BNR.astype(dtype) * scale
    weights_BNR = jax.nn.softmax(scores_BNR, axis=-1)
    a_BNN = jnp.einsum(
        'BNR,BMR->BNM', weights_BNR, jnp.broadcast_to(f_BNR.astype(dtype), (q_BNK.shape[0], n, f_BNR.shape[-1]))
    )
    return clear_padding(jnp.where(mask_BNN, a_BNN, 0).astype(v_BNK.dtype) @ v_BNK, segment_ids_BN)


def _project(weights_BNR: Array, x_BNK: Array) -> Array:
    weights_BNR = weights_BNR.astype(x_BNK.dtype)
    if weights_BNR.shape[0] == 1:
        return jnp.einsum('NR,BNK->BRK', weights_BNR[0], x_BNK)
    return jnp.einsum('BNR,BNK->BRK', weights_BNR, x_BNK)
