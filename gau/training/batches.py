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
    """Makes global [B, N] arrays of a batch.

    Args:
      batch: [b, N] arrays, the same keys in every process.
      sharding: of the global arrays.
      rows: which rows of the global batch those b are (see `local_rows`); None means all of them.
      batch_size: B, with `rows`.
    """

    def put(x_bN: np.ndarray) -> jax.Array:
        if rows is None or len(rows) == batch_size:
            return jax.make_array_from_callback(x_bN.shape, sharding, lambda index: x_bN[index])

        def part(index: tuple[slice, slice]) -> np.ndarray:
            first, stop, _ = index[0].indices(batch_size)
            # A device's rows follow each other, here as there, since `rows` ascend and lack none of them.
            place = rows.index(first)
            return x_bN[place : place + stop - first, index[1]]

        return jax.make_array_from_callback((batch_size, *x_bN.shape[1:]), sharding, part)

    return {key: put(x_bN) for key, x_bN in batch.items()}
