"""How far a student's distribution over the vocabulary is from its teacher's, a slice of positions at a time."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks
from gau.ops.cross_entropy import output_logits, slice_size


def sliced_divergence(
    hidden_BND: Array,
    embedding_VD: Array,
    teacher_hidden_BND: Array,
    teacher_embedding_VD: Array,
    *,
    temperature: float,
    positions_per_slice: int,
    devices: int = 1,
) -> Array:
    """Returns KL(teacher || student) in nats, [B, N], float32 (float64): of softmax(h E^T / temperature), each its own.

    What exists at once is two slices of logits, which the backward pass makes again; see
    `gau.ops.cross_entropy.sliced_cross_entropy`. The two widths D may differ.

    Args:
      hidden_BND: final hidden states of the student.
      embedding_VD: its output matrix.
      teacher_hidden_BND: those of the teacher.
      teacher_embedding_VD: its output matrix, of the same vocabulary.
      temperature: both logits are divided by it.
      positions_per_slice: positions of every sequence that are scored at once, at most.
      devices: how many devices have these arrays together.
    """
    n = hidden_BND.shape[1]
    size = min(slice_size(hidden_BND[..., 0], embedding_VD, positions_per_slice, devices), n)

    def body(_: None, hidden: tuple[Array, Array]) -> tuple[None, Array]:
        student, teacher = (
            jax.nn.log_softmax(output_logits(h_BnD, embedding) / temperature, axis=-1)
            for h_BnD, embedding in zip(hidden, (embedding_VD, teacher_embedding_VD), strict=True)
        )
        return None, jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)

    slices = tuple(jnp.moveaxis(into_chunks(x, size), 1, 0) for x in (hidden_BND, teacher_hidden_BND))
    kl_gBn = jax.lax.scan(jax.checkpoint(body), None, slices)[1]
    return jnp.moveaxis(kl_gBn, 0, 1).reshape(hidden_BND.shape[0], -1)[:, :n]
