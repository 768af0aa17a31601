"""The residual sum, and norms over the last axis (docs/paper.md section 2)."""

import jax
import jax.numpy as jnp
from jax import Array

NORM_EPSILON = 1e-5


def residual_sum(x_BND: Array, y_BND: Array | None, bias_D: Array | None) -> Array:
    """Returns x + y + bias, added up in float32 or better and rounded once to the type of x.

    Args:
      x_BND: the residual stream.
      y_BND: what a layer adds to it, or None.
      bias_D: the bias that y is without, or None.
    """
    total_BND = x_BND.astype(jnp.promote_types(x_BND.dtype, jnp.float32))
    for term in (y_BND, bias_D):
        total_BND = total_BND if term is None else total_BND + term.astype(total_BND.dtype)
    return total_BND.astype(x_BND.dtype)


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
