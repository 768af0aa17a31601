"""The residual sum, and norms over the last axis (docs/paper.md section 2)."""

import jax
import jax.numpy as jnp
from jax import Array

NORM_EPSILON = 1e-5


def residual_sum(x_BND: Array, y_BND: Array | None, bias_D: Array | None) -> Array:
    """Returns x + (y + bias) in the type of x.

    Args:
      x_BND: the residual stream.
      y_BND: what a layer adds to it, or None.
      bias_D: the bias that y is without, or None; None where y is.
    """
    # Not in float32 and rounded once: where the compiler may keep excess precision, it keeps float32 sums for the norm
    # and its gradient, and a Transformer of base size takes 3 % longer on a GPU (LOG.md).
    if bias_D is not None:
        y_BND = y_BND + bias_D.astype(y_BND.dtype)
    return x_BND if y_BND is None else x_BND + y_BND.astype(x_BND.dtype)


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
