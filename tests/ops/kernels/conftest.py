"""What the tests of the kernels share. On a CPU kernels run in Triton's interpreter, on a GPU as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('triton')

# The interpreter has no bfloat16 products.
DTYPES = ['float32', 'bfloat16'] if jax.default_backend() == 'gpu' else ['float32']
# Largest difference, of the largest number.
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}


@pytest.fixture(autouse=True)
def _full_precision():
    # The library's products around the kernels: a GPU would else round float32 to TF32.
    with jax.default_matmul_precision('highest'):
        yield


def documents(n):
    """Segment ids [2, n]: documents that end inside chunks and one that spans several, with padding at two places."""
    first = np.repeat([1, 2, 3, 4], [3, n // 2, n // 8, n - 3 - n // 2 - n // 8])
    first[-(n // 8) :] = 0
    second = np.repeat([7, 0, 5, 6], [n // 3, n // 6, 2, n - 2 - n // 3 - n // 6])
    return jnp.asarray(np.stack([first, second]), jnp.int32)
