"""Cross entropy over the vocabulary, a slice of positions at a time: [B, N, V] logits never exist at once.

`sliced_cross_entropy` gives the loss of every token, `weighted_cross_entropy` the sum that training differentiates,
with a gradient written by hand; `cross_entropy` is the reference of both.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks

# Logits of all rows that a slice holds at most on each device, where rows can be cut: 512 MiB in float32.
MAX_LOGITS = 2**27
# Up to this many, logits are saved for the backward pass: 4 MiB are not worth the computing again.
SAVED_LOGITS = 2**20


def loss_and_gradient(
    logits_BNV: Array, targets_BN: Array, weights_BN: Array, *, vocab_size: int, dtype
) -> tuple[Array, Array]:
    """Returns -log softmax(logits)[target], [B, N], and the gradient of its weighted sum in `dtype`, [B, N, V]."""
    del vocab_size
    is_target_BNV = jnp.arange(logits_BNV.shape[-1]) == targets_BN[..., None]
    log_z_BN = jax.nn.logsumexp(logits_BNV, axis=-1)
    nll_BN = log_z_BN - jnp.where(is_target_BNV, logits_BNV, 0).sum(-1)
    dlogits_BNV = weights_BN[..., None] * (jnp.exp(logits_BNV - log_z_BN[..., None]) - is_target_BNV)
    return nll_BN, dlogits_BNV.astype(dtype)


class SliceLoss(NamedTuple):
    """How loss and gradient of a slice of logits are made; this is the reference, kernels have one of their own.

    Attributes:
      loss_and_gradient: as the function of this name, but that it may have to leave out columns after `vocab_size`.
      columns: rows of logits are a multiple of this long, padded with zeros of the output matrix.
      half_precision: whether logits of bfloat16 hidden states are made and read as float16.
    """

    loss_and_gradient: Callable[..., tuple[Array, Array]] = loss_and_gradient
    columns: int = 1
    half_precision: bool = False


REFERENCE = SliceLoss()


def sliced_cross_entropy(
    hidden_BND: Array, embedding_VD: Array, targets_BN: Array, *, positions_per_slice: int, devices: int = 1
) -> Array:
    """Returns -log softmax(h E^T)[target] in nats, [B, N], float32 (float64 for float64 inputs).

    The slices run along N, so that a batch sharded over devices stays so; a slice's logits are computed again in the
    backward pass, unless there are no more than SAVED_LOGITS in all. N need not be a multiple of the slice. What exists
    at once is one slice: at most MAX_LOGITS scores a device over all rows (B * V where that is more), and at most
    `positions_per_slice` positions.

    Args:
      hidden_BND: final hidden states in the compute type.
      embedding_VD: the output matrix in the parameters' type; cast inside the slice, so that its gradient is summed
        over slices in that type.
      targets_BN: integer targets in [0, V).
      positions_per_slice: positions of every sequence that are scored at once, at most.
      devices: how many devices have these arrays together; each has its share of a slice's logits.
    """
    n = targets_BN.shape[1]
    size = slice_size(targets_BN, embedding_VD, positions_per_slice, devices)
    if n <= size:
        few = targets_BN.size * embedding_VD.shape[0] <= SAVED_LOGITS
        at_once = cross_entropy if few else jax.checkpoint(cross_entropy)
        return at_once(hidden_BND, embedding_VD, targets_BN)

    def body(_, xs):
        return None, cross_entropy(xs[0], embedding_VD, xs[1])

    xs = tuple(jnp.moveaxis(into_chunks(x, size), 1, 0) for x in (hidden_BND, targets_BN))
    loss_gBn = jax.lax.scan(jax.checkpoint(body), None, xs)[1]
    return jnp.moveaxis(loss_gBn, 0, 1).reshape(hidden_BND.shape[0], -1)[:, :n]


def weighted_cross_entropy(
    hidden_BND: Array,
    embedding_VD: Array,
    targets_BN: Array,
    weights_BN: Array,
    *,
    positions_per_slice: int,
    devices: int = 1,
    slice_loss: SliceLoss = REFERENCE,
) -> Array:
    """Returns sum_bn w (-log softmax(h E^T)[target]) in nats, a scalar, float32 (float64 for float64 inputs).

    Where it is differentiated, the forward pass computes each slice's logits once, and from them both the loss and the
    gradients, d logits = w (softmax - onehot), d h = d logits E and d E = sum over slices of d logits^T h; the backward
    pass multiplies them by a scalar. Elsewhere (evaluation) only the loss is computed.

    Softmax and d logits are computed in float32 from logits that are summed in float32. d logits is then rounded to the
    type of h for its two matmuls, which sum in float32: their other factors, E and h, have been rounded to that
    type as well, so the matmuls lose no more by it than they already have (bfloat16: 2^-9 of each addend, independent
    of the others). d E is summed over slices in float32.

    With `slice_loss.half_precision`, logits of bfloat16 hidden states are float16, which halves what is written and
    read of them. They are products of h with E in float16 (rounded by 2^-12 of an addend, where bfloat16 would be by
    2^-9), rounded by 2^-12 of themselves: nearer to the exact ones than float32 logits of a bfloat16 E
    (tests/ops/test_cross_entropy.py). Numbers beyond float16's largest, 65,504, count as that. Evaluation has the
    logits of a bfloat16 E, with kernels and without.

    A position of weight 0 counts for nothing: whatever stands there in h, NaN included, reaches neither the loss nor a
    gradient.

    Slices hold no more logits than those of `sliced_cross_entropy`. One slice has every G-th position, so that each
    device has its share of it where N is sharded, as where B or V is.

    Args:
      hidden_BND: final hidden states in the compute type.
      embedding_VD: the output matrix in the parameters' type, which is that of its gradient.
      targets_BN: integer targets in [0, V).
      weights_BN: weights of the targets, data: they get no gradient (it is zero).
      positions_per_slice: positions of every sequence that are scored at once, at most.
      devices: how many devices have these arrays together; each has its share of a slice's logits.
      slice_loss: how loss and d logits of a slice are made.
    """
    size = slice_size(targets_BN, embedding_VD, positions_per_slice, devices)
    return _weighted_cross_entropy(size, slice_loss, hidden_BND, embedding_VD, targets_BN, weights_BN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_cross_entropy(size, slice_loss, hidden_BND, embedding_VD, targets_BN, weights_BN):
    del slice_loss  # It is about the gradient.
    hidden_BND = _clear_unweighted(hidden_BND, weights_BN)
    nll_BN = sliced_cross_entropy(hidden_BND, embedding_VD, targets_BN, positions_per_slice=size)
    return (nll_BN * weights_BN.astype(nll_BN.dtype)).sum()


def _loss_and_gradients(size, slice_loss, hidden_BND, embedding_VD, targets_BN, weights_BN):
    batch, n = targets_BN.shape
    slices = -(-n // size)
    # Slices of equal size: the last one would else be mostly padding.
    size = -(-n // slices)
    dtype = jnp.promote_types(hidden_BND.dtype, jnp.float32)
    # W columns of logits: V, or as many as matmuls with them are fast for.
    vocab_size = len(embedding_VD)
    embedding_WD = padded_vocabulary(embedding_VD, slice_loss.columns)
    e_WD = embedding_WD.astype(hidden_BND.dtype)
    half_precision = slice_loss.half_precision and hidden_BND.dtype == jnp.bfloat16
    half_e_WD = _half(embedding_WD) if half_precision else None

    def split(x_BN):
        x_BN = jnp.pad(x_BN, [(0, 0), (0, slices * size - n)] + [(0, 0)] * (x_BN.ndim - 2))
        return jnp.moveaxis(x_BN.reshape(batch, size, slices, *x_BN.shape[2:]), 2, 0)

    def one_slice(de_WD, xs):
        h_BnD, targets_Bn, weights_Bn = xs
        if half_precision:
            # The library sums in float32.
            logits_BnW = jnp.einsum('BND,WD->BNW', _half(h_BnD), half_e_WD)
        else:
            logits_BnW = output_logits(h_BnD, e_WD)
        fields = {'vocab_size': vocab_size, 'dtype': h_BnD.dtype}
        nll_Bn, dlogits_BnW = slice_loss.loss_and_gradient(logits_BnW, targets_Bn, weights_Bn, **fields)
        dh_BnD = jnp.einsum('BnW,WD->BnD', dlogits_BnW, e_WD, preferred_element_type=dtype).astype(h_BnD.dtype)
        de_WD += jnp.einsum('BnW,BnD->WD', dlogits_BnW, h_BnD, preferred_element_type=dtype)
        return de_WD, ((nll_Bn * weights_Bn).sum(), dh_BnD)

    xs = tuple(map(split, (_clear_unweighted(hidden_BND, weights_BN), targets_BN, weights_BN.astype(dtype))))
    zeros_WD = jnp.zeros(embedding_WD.shape, dtype)
    de_WD, (loss_g, dh_gBnD) = jax.lax.scan(one_slice, zeros_WD, xs, unroll=slices == 1)
    dh_BND = jnp.moveaxis(dh_gBnD, 0, 2).reshape(batch, size * slices, -1)[:, :n]
    return loss_g.sum(), (dh_BND, de_WD[:vocab_size].astype(embedding_VD.dtype))


def padded_vocabulary(embedding_VD: Array, columns: int) -> Array:
    """Returns the output matrix with rows of zeros up to a multiple of `columns`."""
    more = -len(embedding_VD) % columns
    return jnp.pad(embedding_VD, ((0, more), (0, 0))) if more else embedding_VD


def _half(x: Array) -> Array:
    """Returns x in float16, what lies beyond as the largest number of it."""
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -largest, largest).astype(jnp.float16)


def _times(size, slice_loss, gradients, scale):
    # In float32 (the scalar's type), then back.
    dh_BND, de_VD = ((x * scale).astype(x.dtype) for x in gradients)
    return dh_BND, de_VD, None, None


_weighted_cross_entropy.defvjp(_loss_and_gradients, _times)


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


def slice_size(targets_BN: Array, embedding_VD: Array, positions_per_slice: int, devices: int) -> int:
    """Positions of a sequence in one slice; of its logits, every device holds its share."""
    return min(positions_per_slice, max(1, MAX_LOGITS * devices // (targets_BN.shape[0] * embedding_VD.shape[0])))


def _clear_unweighted(hidden_BND: Array, weights_BN: Array) -> Array:
    return jnp.where(weights_BN[..., None] != 0, hidden_BND, jnp.zeros((), hidden_BND.dtype))
