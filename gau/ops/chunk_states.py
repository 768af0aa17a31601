"""What a chunk can know of the other chunks: sums of k v^T carried between chunks, never from one document to another.

This is the linear half of mixed chunk attention (paper.md section 3) and of Performer. Documents are contiguous, so a
chunk can only continue the one document that is open at its start, and hand on the one that is open at its end. That
is all the state there is: one [S, E] matrix and one count per chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Up to this many chunks the states are one product with a G x G matrix (measured faster than cumsum and scan);
# beyond, a scan over groups of this many chunks keeps the cost linear in the length.
GROUP = 256


class Seen(NamedTuple):
    """States that the tokens of a chunk see.

    Attributes:
      state_BGSE: sum of k v^T over tokens of other chunks, at least float32.
      count_BG: number of tokens in that sum.
      sees_BGC: which tokens of the chunk belong to the document of that state.
    """

    state_BGSE: Array
    count_BG: Array
    sees_BGC: Array


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


def states_of_other_chunks(k_BGCS: Array, v_BGCE: Array, ids_BGC: Array, *, causal: bool) -> list[Seen]:
    """Returns what each chunk sees of the others: the states before it and, unless causal, those after it.

    Args:
      k_BGCS: keys, 0 at padding.
      v_BGCE: values, 0 at padding.
      ids_BGC: segment ids, [B, G, C] or [1, G, C].
      causal: whether later chunks are hidden.
    """
    first_BG, last_BG = first_and_last_document(ids_BGC)
    seen = [_states_before(k_BGCS, v_BGCE, ids_BGC, first_BG, last_BG)]
    if not causal:
        # The later chunks are the earlier ones of the reversed sequence.
        reverse = (x[:, ::-1] for x in (k_BGCS, v_BGCE, ids_BGC, last_BG, first_BG))
        seen.append(Seen(*(x[:, ::-1] for x in _states_before(*reverse))))
    return seen


def _states_before(k_BGCS, v_BGCE, ids_BGC, head_BG, tail_BG) -> Seen:
    """For each chunk, the state of the document at its head, summed over earlier chunks that have it at their tail."""
    dtype = jnp.promote_types(k_BGCS.dtype, jnp.float32)
    at_tail_BGC = (ids_BGC == tail_BG[..., None]) & (ids_BGC > 0)
    k_BGCS = jnp.where(at_tail_BGC[..., None], k_BGCS, 0)
    kv_BGSE = jnp.einsum('BGCS,BGCE->BGSE', k_BGCS, v_BGCE, preferred_element_type=dtype)
    n_BG = at_tail_BGC.sum(-1).astype(dtype)
    if ids_BGC.shape[1] <= GROUP:
        state_BGSE, count_BG = _sum_before(kv_BGSE, n_BG, head_BG, tail_BG)
    else:
        state_BGSE, count_BG = _sum_before_by_groups(kv_BGSE, n_BG, head_BG, tail_BG)
    return Seen(state_BGSE, count_BG, (ids_BGC == head_BG[..., None]) & (ids_BGC > 0))


def _sum_before(kv_BGSE, n_BG, head_BG, tail_BG):
    """M[g] = sum over h < g of kv[h] where the document at h's tail is the one at g's head; the counts likewise."""
    g = jnp.arange(head_BG.shape[1])
    w_BGH = (g[:, None] > g) & (head_BG[:, :, None] == tail_BG[:, None, :]) & (head_BG > 0)[:, :, None]
    w_BGH = w_BGH.astype(kv_BGSE.dtype)
    if w_BGH.shape[0] == 1:
        return jnp.einsum('GH,BHSE->BGSE', w_BGH[0], kv_BGSE), jnp.einsum('GH,BH->BG', w_BGH[0], n_BG)
    return jnp.einsum('BGH,BHSE->BGSE', w_BGH, kv_BGSE), jnp.einsum('BGH,BH->BG', w_BGH, n_BG)


def _sum_before_by_groups(kv_BGSE, n_BG, head_BG, tail_BG):
    """`_sum_before` for many chunks: within groups as there, between groups the one open document is carried."""
    batch, chunks = kv_BGSE.shape[:2]
    head_BG, tail_BG, n_BG = (jnp.broadcast_to(x, (batch, chunks)) for x in (head_BG, tail_BG, n_BG))
    # Scanned over groups: [groups, B, GROUP, ...].
    xs = tuple(jnp.moveaxis(into_chunks(x, GROUP), 1, 0) for x in (kv_BGSE, n_BG, head_BG, tail_BG))

    def body(carry, xs):
        open_kv_BSE, open_n_B, open_id_B = carry
        kv_BGSE, n_BG, head_BG, tail_BG = xs
        state_BGSE, count_BG = _sum_before(kv_BGSE, n_BG, head_BG, tail_BG)
        continues_BG = ((head_BG == open_id_B[:, None]) & (head_BG > 0)).astype(kv_BGSE.dtype)
        state_BGSE += continues_BG[..., None, None] * open_kv_BSE[:, None]
        count_BG += continues_BG * open_n_B[:, None]

        # The document open at the end of the group: of its last chunk that holds a token, else still the old one.
        last_B = first_and_last_document(tail_BG)[1]
        last_B = jnp.where(last_B > 0, last_B, open_id_B)
        same_BG = (tail_BG == last_B[:, None]).astype(kv_BGSE.dtype)
        kept_B = (last_B == open_id_B).astype(kv_BGSE.dtype)
        open_kv_BSE = kept_B[:, None, None] * open_kv_BSE + jnp.einsum('BG,BGSE->BSE', same_BG, kv_BGSE)
        open_n_B = kept_B * open_n_B + (same_BG * n_BG).sum(-1)
        return (open_kv_BSE, open_n_B, last_B), (state_BGSE, count_BG)

    start = (jnp.zeros_like(kv_BGSE[:, 0]), jnp.zeros_like(n_BG[:, 0]), jnp.zeros_like(head_BG[:, 0]))
    _, ys = jax.lax.scan(body, start, xs)
    return tuple(jnp.moveaxis(y, 0, 1).reshape((batch, -1, *y.shape[3:]))[:, :chunks] for y in ys)
