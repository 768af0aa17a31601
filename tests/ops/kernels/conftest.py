import jax.numpy as jnp
import numpy as np


def documents(n):
    """Segment ids [2, n]: documents that end inside chunks and one that spans several, with padding at two places."""
    first = np.repeat([1, 2, 3, 4], [3, n // 2, n // 8, n - 3 - n // 2 - n // 8])
    first[-(n // 8) :] = 0
    second = np.repeat([7, 0, 5, 6], [n // 3, n // 6, 2, n - 2 - n // 3 - n // 6])
    return jnp.asarray(np.stack([first, second]), jnp.int32)
