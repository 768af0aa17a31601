"""Linear recurrences over the chunks of a sequence, y[g] = factor[g] y[g - 1] + x[g], in a few small operations.

`jax.lax.associative_scan` takes a dozen kernels and as many launches for the 64 numbers of a sequence, in every layer.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

# Steps that are one matrix of products of factors.
BLOCK = 64
# Up to so many steps one follows the other: the compiler makes one operation of them and of what is around them.
FEW = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def recurrence(factor_BGL: Array, x_BGL: Array, reverse: bool = False) -> Array:
    """Returns y[g] = factor[g] y[g - 1] + x[g], [B, G, L], from y[-1] = 0.

    Args:
      factor_BGL: factors, 0 where y begins anew; the first one meets nothing.
      x_BGL: what is added, in the same type.
      reverse: whether the recurrence begins with the last g: y[g] = factor[g] y[g + 1] + x[g].
    """
    if reverse:
        return jnp.flip(recurrence(*(jnp.flip(x, axis=1) for x in (factor_BGL, x_BGL))), axis=1)
    batch, groups, columns = x_BGL.shape
    if groups <= FEW:
        steps = [x_BGL[:, 0]]
        for g in range(1, groups):
            steps.append(factor_BGL[:, g] * steps[-1] + x_BGL[:, g])
        return jnp.stack(steps, axis=1)
    size = min(groups, BLOCK)
    blocks = -(-groups // size)
    padding = ((0, 0), (0, blocks * size - groups), (0, 0))
    shape = batch * blocks, size, columns
    factor, x = (jnp.pad(array, padding).reshape(shape) for array in (factor_BGL, x_BGL))
    g = jnp.arange(size)
    # Of later by earlier g, and the factors after the earlier one: their product.
    between_ggg = (g <= g[:, None, None]) & (g > g[:, None])
    weights_BggL = jnp.where(between_ggg[..., None], factor[:, None, None], 1).prod(3)
    y = jnp.sum(jnp.where((g[:, None] >= g)[..., None], weights_BggL, 0) * x[:, None], axis=2)
    if blocks > 1:
        # From the start of a block: the factors up to g.
        reached = weights_BggL[:, :, 0] * factor[:, :1]
        ends = (array[:, -1].reshape(batch, blocks, columns) for array in (reached, y))
        before = jnp.pad(recurrence(*ends), ((0, 0), (1, 0), (0, 0)))[:, :-1]
        y += reached * before.reshape(-1, 1, columns)
    return y.reshape(batch, -1, columns)[:, :groups]


def _forward(factor_BGL, x_BGL, reverse):
    y_BGL = recurrence(factor_BGL, x_BGL, reverse)
    return y_BGL, (factor_BGL, y_BGL)


def _backward(reverse, residuals, dy_BGL):
    factor_BGL, y_BGL = residuals
    ahead = -1 if reverse else 1
    # What comes after g has the factor of the next step on its way back to it.
    dx_BGL = recurrence(_shifted(factor_BGL, -ahead), dy_BGL, not reverse)
    return dx_BGL * _shifted(y_BGL, ahead), dx_BGL


recurrence.defvjp(_forward, _backward)


def _shifted(x_BGL: Array, steps: int) -> Array:
    """Returns x[g - steps], one step ahead or back, with a zero where there is none."""
    if steps > 0:
        return jnp.pad(x_BGL, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jnp.pad(x_BGL, ((0, 0), (0, 1), (0, 0)))[:, 1:]
