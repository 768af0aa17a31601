"""From the rows that a process has loaded to global arrays on the mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """Returns which rows of a batch this process's devices hold, ascending.

    Where the sequence or the tensor axis crosses processes, several need the same rows; each then loads them whole.
    """
    row_sharding = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:1]))
    slices = row_sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (index,) in slices for row in range(batch_size)[index]})


def put_batch(
    batch: dict[str, np.ndarray],
    sharding: NamedSharding,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> dict[str, jax.Array]:
    """Makes global [B, ...] arrays of a batch.

    Args:
      batch: [b, ...] arrays, the same keys in every process.
      sharding: of global [B, N] arrays.
      rows: which rows of the global batch those b are (see `local_rows`); None means all of them.
      batch_size: B, with `rows`.
    """

    def put(x: np.ndarray) -> jax.Array:
        own = of_rank(sharding, x.ndim)
        if rows is None or len(rows) == batch_size:
            return jax.make_array_from_callback(x.shape, own, lambda index: x[index])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first, stop, _ = index[0].indices(batch_size)
            # A device's rows follow each other, here as there, since `rows` ascend and lack none of them.
            place = rows.index(first)
            return x[place : place + stop - first, *index[1:]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), own, part)

    return {key: put(x) for key, x in batch.items()}


def of_rank(sharding: NamedSharding, rank: int) -> NamedSharding:
    """Returns the sharding of a batch's arrays for one with `rank` axes: [B], [B, N] and [B, N, ...]."""
    return NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[:rank]))
