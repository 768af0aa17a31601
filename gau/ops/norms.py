"""Norms over the last axis (docs/paper.md section 2)."""

import jax
import jax.numpy as jnp
from jax import Array

NORM_EPSILON = 1e-5


def scale_norm(x: Array, g: Array, *, dtype) -> Array:
    """Returns x / rms(x) * g over the last axis, computed in float32 or better.

    Args:
      x: [..., D].
      g: scale: one number (ScaleNorm), or one for each feature (RMSNorm); float32 or better.
      dtype: of the result.
    """
    x = x.astype(jnp.promote_types(x.dtype, g.dtype))
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + NORM_EPSILON) * g).astype(dtype)


def layer_norm(x: Array, g: Array, b: Array, *, dtype) -> Array:
    """Returns (x - mean) / std * g + b over the last axis; arguments as of `scale_norm`, b like g."""
    x = x.astype(jnp.promote_types(x.dtype, g.dtype))
    x = x - x.mean(-1, keepdims=True)
    return (scale_norm(x, g, dtype=x.dtype) + b).astype(dtype)
