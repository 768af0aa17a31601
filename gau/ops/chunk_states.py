"""What a chunk can know of the other chunks: sums of k v^T carried between chunks, never from one document to another.

This is the linear half of mixed chunk attention (docs/paper.md section 3) and of Performer. Documents are contiguous,
so a chunk can only continue the one document that is open at its start, and hand on the one that is open at its end.
That is all the state there is: one [S, E] matrix and one count per chunk.

Keys may come with a factor exp(log_scale) that no float holds (FAVOR+). A state is then kept over the factor of the
largest key in it, whose logarithm stands beside it. That maximum runs over what the state sums up and over nothing
else, so that no later token and no other document reaches a result, not even by rounding.

Where the tokens are spread over the devices of a mesh axis, in whole chunks, each device hands on one state, too: that
of the document open at its end. This is all that devices tell each other.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Up to this many chunks the states are one matmul with a G x G matrix (measured faster than cumsum and scan);
# beyond, a scan over groups of this many chunks keeps the cost linear in the length.
GROUP = 256
# Logarithm of the factor of a sum over nothing: below every other, and finite, so that no difference is NaN.
LOWEST = -1e30


class Seen(NamedTuple):
    """States that the tokens of a chunk see.

    Attributes:
      state_BGSE: sum of k v^T over tokens of other chunks, at least float32.
      count_BG: number of tokens in that sum; where keys have factors, the sum of these, over the same scale.
      sees_BGC: which tokens of the chunk belong to the document of that state.
      log_scale_BG: the state is to be multiplied by exp of this; None where keys have no factors.
    """

    state_BGSE: Array
    count_BG: Array
    sees_BGC: Array
    log_scale_BG: Array | None = None


def into_chunks(x: Array, chunk: int, *, axis: int = 1) -> Array:
    """Returns x with its token axis [N] split into [G, C]; N is padded with zeros (segment 0) to a multiple of C."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % chunk)
    x = jnp.pad(x, padding)
    return x.reshape((*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]))


def first_and_last_document(ids_BGC: Array) -> tuple[Array, Array]:
    """Returns the ids of the first and the last token of each chunk that is not padding, [B, G]; 0 if none is."""
    valid = ids_BGC > 0

    def pick(ids, valid):
        return jnp.take_along_axis(ids, jnp.argmax(valid, axis=-1)[..., None], axis=-1)[..., 0]

    return pick(ids_BGC, valid), pick(ids_BGC[..., ::-1], valid[..., ::-1])


def relative_weights(sees: Array, log_scale: Array | None, dtype) -> tuple[Array, Array | None]:
    """Returns the weights [..., M] of things summed up, 0 where not seen, over the largest, and its logarithm [...].

    Args:
      sees: bool [..., M].
      log_scale: logarithms of the weights, [..., M] or what broadcasts to it; None: they are all 1.
      dtype: type of the weights.
    """
    if log_scale is None:
        return sees.astype(dtype), None
    top = jnp.where(sees, log_scale, LOWEST).max(-1)
    return jnp.where(sees, jnp.exp(log_scale - top[..., None]), 0).astype(dtype), top


def add_scaled(x: Any, log_x: Array | None, y: Any, log_y: Array | None) -> tuple[Any, Array | None]:
    """Returns x exp(log_x) + y exp(log_y) over the larger of both factors, and its logarithm.

    Args:
      x: [..., any], or a tree of such arrays.
      log_x: [...]; None, as `log_y` then is: both factors are 1.
      y: as x.
      log_y: as `log_x`.
    """
    if log_x is None:
        return jax.tree.map(jnp.add, x, y), None
    top = jnp.maximum(log_x, log_y)

    def add(x, y):
        scale_x, scale_y = (
            jnp.exp(log - top).reshape(*top.shape, *[1] * (x.ndim - top.ndim)) for log in (log_x, log_y)
        )
        return x * scale_x + y * scale_y

    return jax.tree.map(add, x, y), top


def states_of_other_chunks(
    k_BGCS: Array,
    v_BGCE: Array,
    ids_BGC: Array,
    *,
    causal: bool,
    log_scale_BGC: Array | None = None,
    sequence_axis: str | None = None,
) -> list[Seen]:
    """Returns what each chunk sees of the others: the states before it and, unless causal, those after it.

    Args:
      k_BGCS: keys, 0 at padding.
      v_BGCE: values, 0 at padding.
      ids_BGC: segment ids, [B, G, C] or [1, G, C].
      causal: whether later chunks are hidden.
      log_scale_BGC: the logarithm of each key's factor, no gradient goes there; or None.
      sequence_axis: mesh axis over whose devices the chunks are spread in order (inside `jax.shard_map`), or None.
    """
    first_BG, last_BG = first_and_last_document(ids_BGC)
    before = functools.partial(_states_before, sequence_axis=sequence_axis, backwards=False)
    seen = [before(k_BGCS, v_BGCE, ids_BGC, first_BG, last_BG, log_scale_BGC)]
    if not causal:
        # The later chunks are the earlier ones of the reversed sequence.
        reverse = jax.tree.map(lambda x: x[:, ::-1], (k_BGCS, v_BGCE, ids_BGC, last_BG, first_BG, log_scale_BGC))
        after = _states_before(*reverse, sequence_axis=sequence_axis, backwards=True)
        seen.append(jax.tree.map(lambda x: x[:, ::-1], after))
    return seen


def _states_before(k_BGCS, v_BGCE, ids_BGC, head_BG, tail_BG, log_scale_BGC, *, sequence_axis, backwards) -> Seen:
    """For each chunk, the state of the document at its head, summed over earlier chunks that have it at their tail."""
    dtype = jnp.promote_types(k_BGCS.dtype, jnp.float32)
    at_tail_BGC = (ids_BGC == tail_BG[..., None]) & (ids_BGC > 0)
    k_BGCS = jnp.where(at_tail_BGC[..., None], k_BGCS, 0)
    weights_BGC, log_scale_BG = at_tail_BGC, None
    if log_scale_BGC is not None:
        weights_BGC, log_scale_BG = relative_weights(at_tail_BGC, log_scale_BGC, dtype)
        k_BGCS = k_BGCS * weights_BGC[..., None]
    kv_BGSE = jnp.einsum('BGCS,BGCE->BGSE', k_BGCS, v_BGCE, preferred_element_type=dtype)
    n_BG = weights_BGC.sum(-1).astype(dtype)
    sum_before = _sum_before if ids_BGC.shape[1] <= GROUP else _sum_before_by_groups
    state = sum_before(kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG)
    if sequence_axis is not None:
        opened = _open_at_start(
            kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG, sequence_axis=sequence_axis, backwards=backwards
        )
        state = _add_open(*state, head_BG, *opened)
    state_BGSE, count_BG, log_scale_BG = state
    return Seen(state_BGSE, count_BG, (ids_BGC == head_BG[..., None]) & (ids_BGC > 0), log_scale_BG)


def _open_at_start(kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG, *, sequence_axis, backwards):
    """The document at the head of this device's chunks, summed over the devices before it that have it at their tail.

    Every device gathers one state, count and document of every other: A S E numbers, whatever the length.

    Returns:
      The state [B, S, E], its count [B], its document [B] (0: none) and the logarithm of its factor [B] or None.
    """
    batch, chunks = kv_BGSE.shape[:2]
    head_BG, tail_BG, n_BG = (jnp.broadcast_to(x, (batch, chunks)) for x in (head_BG, tail_BG, n_BG))
    head_B, tail_B = first_and_last_document(head_BG)[0], first_and_last_document(tail_BG)[1]
    at_tail_BG = (tail_BG == tail_B[:, None]) & (tail_BG > 0)
    w_BG, log_B = relative_weights(at_tail_BG, log_scale_BG, kv_BGSE.dtype)
    own = (jnp.einsum('BG,BGSE->BSE', w_BG, kv_BGSE), (w_BG * n_BG).sum(-1), tail_B, log_B)
    kv_BASE, n_BA, tail_BA, log_BA = jax.tree.map(lambda x: jax.lax.all_gather(x, sequence_axis, axis=1), own)

    device, here = jnp.arange(tail_BA.shape[1]), jax.lax.axis_index(sequence_axis)
    earlier_A = device > here if backwards else device < here
    sees_BA = earlier_A & (tail_BA == head_B[:, None]) & (head_B > 0)[:, None]
    w_BA, log_B = relative_weights(sees_BA, log_BA, kv_BGSE.dtype)
    return jnp.einsum('BA,BASE->BSE', w_BA, kv_BASE), (w_BA * n_BA).sum(-1), head_B, log_B


def _add_open(state_BGSE, count_BG, log_BG, head_BG, open_kv_BSE, open_n_B, open_id_B, open_log_B):
    """Adds the open document's state to that of every chunk which has this document at its head."""
    continues_BG = (head_BG == open_id_B[:, None]) & (head_BG > 0)
    open_BGSE = continues_BG[..., None, None].astype(open_kv_BSE.dtype) * open_kv_BSE[:, None]
    open_log_BG = None if open_log_B is None else jnp.where(continues_BG, open_log_B[:, None], LOWEST)
    opened = open_BGSE, continues_BG * open_n_B[:, None]
    (state_BGSE, count_BG), log_BG = add_scaled((state_BGSE, count_BG), log_BG, opened, open_log_BG)
    return state_BGSE, count_BG, log_BG


def _sum_before(kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG):
    """M[g] = sum over h < g of kv[h] where the document at h's tail is the one at g's head; the counts likewise."""
    g = jnp.arange(head_BG.shape[1])
    w_BGI = (g[:, None] > g) & (head_BG[:, :, None] == tail_BG[:, None, :]) & (head_BG > 0)[:, :, None]
    log_scale_B1G = None if log_scale_BG is None else log_scale_BG[:, None]
    w_BGI, log_scale_BG = relative_weights(w_BGI, log_scale_B1G, kv_BGSE.dtype)
    if w_BGI.shape[0] == 1:
        w_GI = w_BGI[0]
        return jnp.einsum('GI,BISE->BGSE', w_GI, kv_BGSE), jnp.einsum('GI,BI->BG', w_GI, n_BG), log_scale_BG
    return jnp.einsum('BGI,BISE->BGSE', w_BGI, kv_BGSE), jnp.einsum('BGI,BI->BG', w_BGI, n_BG), log_scale_BG


def _sum_before_by_groups(kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG):
    """`_sum_before` for many chunks: within groups as there, between groups the one open document is carried."""
    batch, chunks = kv_BGSE.shape[:2]
    head_BG, tail_BG, n_BG = (jnp.broadcast_to(x, (batch, chunks)) for x in (head_BG, tail_BG, n_BG))
    # Scanned over groups: [groups, B, GROUP, ...].
    xs = jax.tree.map(
        lambda x: jnp.moveaxis(into_chunks(x, GROUP), 1, 0), (kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG)
    )

    def body(carry, xs):
        open_kv_BSE, open_n_B, open_id_B, open_log_B = carry
        kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG = xs
        state = _add_open(*_sum_before(kv_BGSE, n_BG, head_BG, tail_BG, log_scale_BG), head_BG, *carry)

        # The document open at the end of the group: of its last chunk that holds a token, else still the old one.
        last_B = first_and_last_document(tail_BG)[1]
        last_B = jnp.where(last_B > 0, last_B, open_id_B)
        same_BG = (tail_BG == last_B[:, None]) & (tail_BG > 0)
        same_B = last_B == open_id_B
        w_BG, new_log_B = relative_weights(same_BG, log_scale_BG, kv_BGSE.dtype)
        old = same_B[:, None, None].astype(kv_BGSE.dtype) * open_kv_BSE, same_B * open_n_B
        old_log_B = None if open_log_B is None else jnp.where(same_B, open_log_B, LOWEST)
        new = jnp.einsum('BG,BGSE->BSE', w_BG, kv_BGSE), (w_BG * n_BG).sum(-1)
        (open_kv_BSE, open_n_B), new_log_B = add_scaled(old, old_log_B, new, new_log_B)
        return (open_kv_BSE, open_n_B, last_B, new_log_B), state

    start_log_B = None if log_scale_BG is None else jnp.full_like(log_scale_BG[:, 0], LOWEST)
    start = (jnp.zeros_like(kv_BGSE[:, 0]), jnp.zeros_like(n_BG[:, 0]), jnp.zeros_like(head_BG[:, 0]), start_log_B)
    _, ys = jax.lax.scan(body, start, xs)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape((batch, -1, *y.shape[3:]))[:, :chunks], ys)
