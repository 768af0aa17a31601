"""Pallas kernels for TPUs: whether they are interpreted, on a CPU, to test them without one; and their matmuls."""

import os

import jax
import jax.numpy as jnp
from jax import Array


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter: where the environment variable GAU_PALLAS_INTERPRET is 1."""
    return os.environ.get('GAU_PALLAS_INTERPRET', '0') == '1'


def dot(x: Array, y: Array, contract: str = 'ij,jk') -> Array:
    """Returns x y, or x y^T for 'ij,kj', or x^T y for 'ji,jk', float32; factors of float32 are not rounded."""
    left, right = contract.split(',')
    dimensions = ((left.index('j'),), (right.index('j'),)), ((), ())
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)
