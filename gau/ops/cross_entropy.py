"""Cross entropy over the vocabulary, a slice of positions at a time: [B, N, V] logits never exist at once."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks

# Logits of all rows that a slice holds at most, where rows can be cut: 256 MiB in float32.
MAX_LOGITS = 2**26
# Up to this many, logits are kept for the backward pass: 4 MiB are not worth the computing again.
KEPT_LOGITS = 2**20


def sliced_cross_entropy(
    hidden_BND: Array, embedding_VD: Array, targets_BN: Array, *, positions_per_slice: int
) -> Array:
    """Returns -log softmax(h E^T)[target] in nats, [B, N], float32 (float64 for float64 inputs).

    The slices run along N, so that a batch sharded over devices stays so; a slice's logits are computed again in the
    backward pass, unless there are no more than KEPT_LOGITS in all. N need not be a multiple of the slice. What exists
    at once is one slice: at most MAX_LOGITS scores over all rows and devices (B * V where that is more), and at most
    `positions_per_slice` positions.

    Args:
      hidden_BND: final hidden states in the compute type.
      embedding_VD: the output matrix in the parameters' type; cast inside the slice, so that its gradient is summed
        over slices in that type.
      targets_BN: integer targets in [0, V).
      positions_per_slice: positions of every sequence that are scored at once, at most.
    """
    batch, n = targets_BN.shape
    logits_per_position = batch * embedding_VD.shape[0]
    size = min(positions_per_slice, max(1, MAX_LOGITS // logits_per_position))
    if n <= size:
        at_once = cross_entropy if n * logits_per_position <= KEPT_LOGITS else jax.checkpoint(cross_entropy)
        return at_once(hidden_BND, embedding_VD, targets_BN)

    def body(_, xs):
        return None, cross_entropy(xs[0], embedding_VD, xs[1])

    xs = tuple(jnp.moveaxis(into_chunks(x, size), 1, 0) for x in (hidden_BND, targets_BN))
    loss_gBn = jax.lax.scan(jax.checkpoint(body), None, xs)[1]
    return jnp.moveaxis(loss_gBn, 0, 1).reshape(hidden_BND.shape[0], -1)[:, :n]


def cross_entropy(hidden_BND: Array, embedding_VD: Array, targets_BN: Array) -> Array:
    """`sliced_cross_entropy` with all logits at once, the reference."""
    logits_BNV = output_logits(hidden_BND, embedding_VD)
    # Picked by comparison and not by index: this stays local where the vocabulary is sharded.
    is_target_BNV = jnp.arange(logits_BNV.shape[-1]) == targets_BN[..., None]
    return jax.nn.logsumexp(logits_BNV, axis=-1) - jnp.where(is_target_BNV, logits_BNV, 0).sum(-1)


def output_logits(hidden_BND: Array, embedding_VD: Array) -> Array:
    """Returns h E^T, [B, N, V], float32 (float64 for float64 inputs)."""
    dtype = jnp.promote_types(hidden_BND.dtype, jnp.float32)
    return jnp.einsum('BND,VD->BNV', hidden_BND, embedding_VD.astype(hidden_BND.dtype), preferred_element_type=dtype)
