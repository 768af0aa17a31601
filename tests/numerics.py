"""Helpers of the tests of models, layers and ops: random parameters that matter, and float64."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Layouts of 24 tokens: documents that end inside a chunk, holes, padding on either side and in between, neighbours
# with the higher id first.
LAYOUTS = {
    'one': [1] * 24,
    'packed': [1] * 5 + [2] * 11 + [3] * 8,
    'right padding': [1] * 17 + [0] * 7,
    'left padding': [0] * 6 + [4] * 18,
    'holes': [1] * 3 + [0] * 2 + [1] * 6 + [0] * 6 + [1] * 2 + [7] * 2 + [0] + [7] * 2,
    'short': [2, 1, 3, 3, 5, 4, 4, 4, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3, 1, 0],
    'empty': [0] * 24,
}


@contextlib.contextmanager
def float64():
    """Enables float64 inside the block and nowhere else."""
    with jax.enable_x64(True):
        yield


def random_like(params, seed, scale=0.3):
    """Parameters of these shapes so that everything matters: gamma and scales of order 1 (docs/paper.md, trap 2)."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        x = generator.standard_normal(leaf.shape)
        if name == 'gamma':
            return jnp.asarray(x, leaf.dtype)
        if name == 'scale':
            return jnp.asarray(1 + 0.3 * x, leaf.dtype)
        return jnp.asarray(scale * x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(params))


def normal(seed, *shape):
    """A float array from N(0, 1), as wide as jax has enabled."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def max_error(x, y):
    """Largest difference between two trees, relative to the largest number in the second tree; NaN if any is NaN.

    Numbers below 1e-12 count as 0: a gradient that is 0 in one order of sums is 1e-17 in another.
    """
    x, y = jax.tree.leaves(x), jax.tree.leaves(y)
    assert len(x) == len(y)
    # Not Python's max, which passes over a NaN that does not come first.
    largest = np.max([1e-12] + [np.abs(b).max() for b in y if np.size(b)])
    return float(np.max([np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(x, y, strict=True)]) / largest)


def finite_difference(f, args, seed, epsilon=1e-6):
    """Directional derivative of the scalar f(*args) along a random direction, and that direction."""
    generator = np.random.default_rng(seed)
    direction = [generator.standard_normal(np.shape(a)) for a in args]
    up, down = (
        f(*(np.asarray(a) + sign * epsilon * d for a, d in zip(args, direction, strict=True))) for sign in (1, -1)
    )
    return (up - down) / (2 * epsilon), direction
