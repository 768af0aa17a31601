"""How the scans over the chunks of a sequence go on from device to device, where its chunks are spread over them.

A device first makes the state that its own chunks leave, S x E, and begins with what those of the others are together;
the gradients of states go the other way likewise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Shards(NamedTuple):
    """How the scans of a sequence go on from device to device; factors, float32, without a gradient.

    Attributes:
      begin_BJA: of the state that each of A devices leaves, in the one with which a scan of this device begins.
      leave_BJA: of the state that this device leaves, in the one with which a scan of each of the others begins.
    """

    begin_BJA: Array
    leave_BJA: Array


def shards_of_scans(carry_mask_BGJ: Array, on_device: int, device: Array) -> Shards:
    """Returns how scans go on from device to device, from the carry masks of all chunks, `on_device` on each."""
    batch, _, directions = carry_mask_BGJ.shape
    over_BAJ = carry_mask_BGJ.reshape(batch, -1, on_device, directions).prod(axis=2)
    a = jnp.arange(over_BAJ.shape[1])
    begins, leaves = a[:, None], a
    # A state is carried over all devices between the one that left it and the one that begins with it.
    between = (a > jnp.minimum(begins, leaves)[..., None]) & (a < jnp.maximum(begins, leaves)[..., None])
    weights = [
        jnp.where(before, jnp.where(between, over_BAJ[:, None, None, :, j], 1).prod(axis=-1), 0)
        for j, before in enumerate((leaves < begins, leaves > begins)[:directions])
    ]
    weights_BJAA = jnp.stack(weights, axis=1)
    begin_BJA, leave_BJA = (jnp.take(weights_BJAA, device, axis=axis) for axis in (2, 3))
    return Shards(begin_BJA, leave_BJA)


def states_of_other_shards(left: Sequence[Array], weights_BJA: Array, sequence_axis: str) -> list[Array]:
    """Returns with what the scans of this device begin, [B, S, E] each, given what they leave on every device."""
    of_all = [jax.lax.all_gather(left_BSE, sequence_axis, axis=1) for left_BSE in left]
    return [
        jnp.einsum('BA,BASE->BSE', weights_BJA[:, j], left_BASE, precision=jax.lax.Precision.HIGHEST)
        for j, left_BASE in enumerate(of_all)
    ]
