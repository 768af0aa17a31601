"""What a chunk can know of earlier chunks where the state forgets by a gate, and where it may leave the last one out.

    M[g + 1] = d[g] M[g] + k[g]^T v[g]      d[g] = sigmoid(mean of the logits of chunk g's tokens)

Chunk g reads M[g], or M[g - 1] where it sees the chunk before otherwise. M begins with zeros in every document, and a
gate's logits reach no other one: a chunk with tokens of two documents hands nothing on from before it.
`gau.ops.chunk_states` has the same without a gate as a matmul over all chunks.

Padding has no logits: a chunk of nothing else keeps the state, d[g] = 1. Were it less, the count of tokens in the state
of a row that ends with many such chunks would be no normal number of float32 any more, nor a gradient by it a number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import first_and_last_document, into_chunks

# What a decay has left of a count when nobody reads it any more; float32's smallest normal number is 1e-38.
LEAST_COUNT = 1e-30


class Carried(NamedTuple):
    """The state that the tokens of a chunk read of earlier chunks.

    Attributes:
      state_BGSE: weighted sum of k v^T, at least float32.
      count_BG1: sum of the weights of the tokens in it.
      sees_BGC: which tokens of the chunk belong to the document of that state.
    """

    state_BGSE: Array
    count_BG1: Array
    sees_BGC: Array


def log_decays(logits_BN1: Array, segment_ids_BN: Array | None, chunk_size: int) -> Array:
    """Returns log d of every chunk, [B, G, 1], from the logits of its tokens; 0 where all of them are padding."""
    logits_BGC1 = into_chunks(logits_BN1, chunk_size)
    ids_BN = jnp.ones(logits_BN1.shape[:2], jnp.int32) if segment_ids_BN is None else segment_ids_BN
    real_BGC1 = into_chunks(ids_BN, chunk_size)[..., None] > 0
    total_BG1, number_BG1 = jnp.where(real_BGC1, logits_BGC1, 0).sum(2), real_BGC1.sum(2)
    return jnp.where(number_BG1 > 0, jax.nn.log_sigmoid(total_BG1 / jnp.maximum(number_BG1, 1)), 0)


def previous_chunk(x_BG: Array, sequence_axis: str | None = None) -> Array:
    """Returns what chunk g - 1 has in the place of chunk g, [B, G, ...]; zeros before the first one.

    `sequence_axis` is the mesh axis over whose devices the chunks are spread in order (inside `jax.shard_map`).
    """
    first_B1 = jnp.zeros_like(x_BG[:, :1])
    if sequence_axis is not None:
        pairs = [(device, device + 1) for device in range(jax.lax.axis_size(sequence_axis) - 1)]
        # A device that nobody sends to gets zeros.
        first_B1 = jax.lax.ppermute(x_BG[:, -1:], sequence_axis, pairs)
    return jnp.concatenate([first_B1, x_BG[:, :-1]], axis=1)


def carried_states(
    k_BGCS: Array,
    v_BGCE: Array,
    ids_BGC: Array,
    log_decay_BG1: Array,
    *,
    delay: int = 0,
    sequence_axis: str | None = None,
) -> Carried:
    """Returns what each chunk finds of the chunks before it.

    Args:
      k_BGCS: keys, 0 at padding.
      v_BGCE: values, 0 at padding.
      ids_BGC: segment ids, [B, G, C] or [1, G, C].
      log_decay_BG1: log d; B and G may be 1.
      delay: how many of the chunks just before it a chunk does not find in the state.
      sequence_axis: mesh axis over whose devices the chunks are spread in order (inside `jax.shard_map`), or None.
    """
    dtype = jnp.promote_types(k_BGCS.dtype, jnp.float32)
    batch, groups = k_BGCS.shape[:2]
    ids_BGC = jnp.broadcast_to(ids_BGC, (batch, *ids_BGC.shape[1:]))
    _, last_BG = first_and_last_document(ids_BGC)
    at_tail_BGC = (ids_BGC == last_BG[..., None]) & (ids_BGC > 0)
    # The document of the last chunk so far that was not all padding: open after a chunk, and when it begins.
    came_B = _open_before(last_BG, sequence_axis)
    latest_BG = jax.lax.cummax(jnp.where(last_BG > 0, jnp.arange(groups), -1), axis=1)
    after_BG = jnp.take_along_axis(last_BG, jnp.maximum(latest_BG, 0), axis=1)
    after_BG = jnp.where(latest_BG < 0, came_B[:, None], after_BG)
    open_BG = jnp.concatenate([came_B[:, None], after_BG[:, :-1]], axis=1)
    carried_BG1 = ((after_BG == open_BG) & (open_BG > 0))[..., None]
    factor_BG1 = jnp.where(carried_BG1, jnp.exp(log_decay_BG1.astype(dtype)), 0)

    k_BGCS = jnp.where(at_tail_BGC[..., None], k_BGCS, 0)
    kv_BGSE = jnp.einsum('BGCS,BGCE->BGSE', k_BGCS, v_BGCE, preferred_element_type=dtype)
    n_BG1 = at_tail_BGC.sum(-1).astype(dtype)[..., None]

    def step(carry, chunk):
        factor_B1, *added = chunk
        return after_chunk(carry, factor_B1, added), carry

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (factor_BG1, kv_BGSE, n_BG1))
    start = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), (kv_BGSE, n_BG1))
    left, found = jax.lax.scan(step, start, xs, unroll=min(groups, 8))
    state_BGSE, count_BG1 = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
    if sequence_axis is not None:
        state_BSE, count_B1 = _left_by_others(left, factor_BG1.prod(1), sequence_axis)
        reached_BG1 = jnp.concatenate([jnp.ones_like(factor_BG1[:, :1]), factor_BG1[:, :-1]], axis=1).cumprod(1)
        state_BGSE += reached_BG1[..., None] * state_BSE[:, None]
        count_BG1 += reached_BG1 * count_B1[:, None]
    for _ in range(delay):
        open_BG, state_BGSE, count_BG1 = (previous_chunk(x, sequence_axis) for x in (open_BG, state_BGSE, count_BG1))
    return Carried(state_BGSE, count_BG1, (ids_BGC == open_BG[..., None]) & (ids_BGC > 0))


def after_chunk(carry: tuple[Array, Array], factor_B1: Array, added: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns state [B, S, E] and count [B, 1] after a chunk, given its factor on them and what it adds to both."""
    (state_BSE, count_B1), (kv_BSE, n_B1) = carry, added
    return factor_B1[..., None] * state_BSE + kv_BSE, factor_B1 * count_B1 + n_B1


def one_over_count(count: Array) -> Array:
    """Returns 1 / count, the factor that makes a mean of a sum; 1 where nothing, or next to nothing, is counted.

    A query counts at least the newest tokens before it whole. What less is counted, only padding sees, long after the
    last token: by then a decay is too small for float32, in which 1 over it is infinite, and 0 times that not 0.
    """
    return 1 / jnp.where(count > LEAST_COUNT, count, 1)


def _open_before(last_BG: Array, sequence_axis: str | None) -> Array:
    """The document that is open where this device's chunks begin, [B]; 0: none."""
    if sequence_axis is None:
        return jnp.zeros_like(last_BG[:, 0])
    # 0 where a device has padding alone.
    left_BA = jax.lax.all_gather(first_and_last_document(last_BG)[1], sequence_axis, axis=1)
    earlier_A = jnp.arange(left_BA.shape[1]) < jax.lax.axis_index(sequence_axis)
    return first_and_last_document(jnp.where(earlier_A, left_BA, 0))[1]


def _left_by_others(left, factor_B1: Array, sequence_axis: str):
    """State and count that come to this device from those before it: each leaves its own, and a factor on what came."""
    of_all = jax.tree.map(lambda x: jax.lax.all_gather(x, sequence_axis), (factor_B1, left))
    devices = jnp.arange(of_all[0].shape[0])

    def step(carry, device):
        number, (factor_B1, added) = device
        earlier = number < jax.lax.axis_index(sequence_axis)
        return jax.tree.map(lambda x, y: jnp.where(earlier, x, y), after_chunk(carry, factor_B1, added), carry), None

    return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, left), (devices, of_all))[0]
