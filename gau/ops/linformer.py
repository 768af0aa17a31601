"""Linformer (Wang et al. 2020): keys and values projected along the sequence from N tokens to U slots.

    out = softmax(Q (E K)^T / sqrt(K)) (F V)

A slot mixes the whole sequence, so there is no causal form. Documents packed together are projected each for itself,
by the position within the document: then packing changes nothing.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding, visibility_mask
from gau.ops.tracing import choose


def linformer_attention(
    q_BNK: Array,
    k_BNK: Array,
    v_BNK: Array,
    e_BNU: Array,
    f_BNU: Array,
    *,
    segment_ids_BN: Array | None = None,
    impl: str = 'xla',
) -> Array:
    """Returns the formula above for one head, [B, N, K] in the dtype of v; zeros at padding.

    Args:
      q_BNK: queries.
      k_BNK: keys.
      v_BNK: values.
      e_BNU: for every token the weights by which its key enters the U slots, [B, N, U] or [1, N, U].
      f_BNU: the same for its value.
      segment_ids_BN: documents and padding, or None.
      impl: 'xla' projects first and is linear in N. With segment ids it is 'reference': there the slots differ from
        document to document and the products are masked in an N x N form, which costs what full attention costs.
    """
    dtype = jnp.promote_types(q_BNK.dtype, jnp.float32)
    q_BNK, k_BNK, v_BNK = (clear_padding(x, segment_ids_BN) for x in (q_BNK, k_BNK, v_BNK))
    scale = q_BNK.shape[-1] ** -0.5
    if choose(impl, {'reference': False, 'xla': segment_ids_BN is None}):
        slots_k, slots_v = (_project(weights, x) for weights, x in ((e_BNU, k_BNK), (f_BNU, v_BNK)))
        scores_BNU = jnp.einsum('BNK,BUK->BNU', q_BNK, slots_k, preferred_element_type=dtype) * scale
        return jax.nn.softmax(scores_BNU, axis=-1).astype(v_BNK.dtype) @ slots_v

    n = q_BNK.shape[1]
    mask_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=n, m=n, causal=False)
    mask_BNN = jnp.ones((1, n, n), bool) if mask_BNN is None else mask_BNN
    products_BNN = jnp.einsum('BNK,BMK->BNM', q_BNK, k_BNK, preferred_element_type=dtype)
    scores_BNU = jnp.where(mask_BNN, products_BNN, 0) @ e_BNU.astype(dtype) * scale
    weights_BNU = jax.nn.softmax(scores_BNU, axis=-1)
    a_BNN = jnp.einsum(
        'BNU,BMU->BNM', weights_BNU, jnp.broadcast_to(f_BNU.astype(dtype), (q_BNK.shape[0], n, f_BNU.shape[-1]))
    )
    return clear_padding(jnp.where(mask_BNN, a_BNN, 0).astype(v_BNK.dtype) @ v_BNK, segment_ids_BN)


def _project(weights_BNU: Array, x_BNK: Array) -> Array:
    weights_BNU = weights_BNU.astype(x_BNK.dtype)
    if weights_BNU.shape[0] == 1:
        return jnp.einsum('NU,BNK->BUK', weights_BNU[0], x_BNK)
    return jnp.einsum('BNU,BNK->BUK', weights_BNU, x_BNK)
