"""Queries and keys in kernels against the plain formula in float64, values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import queries_keys as reference
from gau.ops.kernels import queries_keys as host
from gau.ops.kernels import tile_sizes
from gau.ops.positions import rope_table
from tests.numerics import max_error
from tests.ops.kernels.conftest import DTYPES, TOLERANCE

OPS = {'reference': reference.queries_and_keys, 'triton': host.queries_and_keys}
NAMES = ('z', 'others', 'bias', 'gamma', 'beta', 'mix')


def values_and_gradients(impl, dtype, args, weights, table, follows, rotated):
    def loss(z, others, bias, gamma, beta, mix):
        # Three columns of another reader, who takes all of them from here.
        shift = None if follows is None else (mix, follows)
        p = jnp.concatenate([others, z], axis=-1)
        roles, p = OPS[impl](p, bias, gamma, beta, table, shift, rotated=rotated)
        assert all(y.dtype == dtype for y in roles)
        return sum(jnp.sum(y * w) for y, w in zip(roles, weights, strict=True)) + jnp.sum(p * p), roles

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4, 5), has_aux=True))
    (_, roles), gradients = gradient(*(x.astype(dtype) for x in args[:2]), *args[2:])
    return roles, gradients


def positions(kind, batch, n):
    """Those of one sequence for all rows, or random ones for each row (local: for the first two roles)."""
    if kind == 'shared':
        return jnp.arange(n)[None]
    return jnp.asarray(np.random.default_rng(1).integers(0, 500, (batch, n)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('roles', 'batch', 'n', 's', 'rope'),
    [
        # Tiles that stick out of the rows; of half the width; an odd width; several tiles for a program.
        (2, 2, 13, 16, 'shared'),
        (4, 2, 13, 16, 'shared, shifted'),
        (4, 3, 5, 12, 'local'),
        (2, 1, 7, 9, 'none, shifted'),
        (4, 1, 7, 9, 'none'),
        (4, 2, 11, 70, 'shared'),
        (2, 2, 9, 256, 'own, shifted'),
        (4, 1, 17, 128, 'none'),
        # More than a kernel has pointers for.
        (6, 2, 9, 12, 'own, shifted'),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [
            (2, 3, 5, 12, 'own'), (4, 2, 13, 16, 'own'), (4, 3, 5, 12, 'local, shifted'),
            (2, 2, 37, 70, 'shared'), (4, 2, 37, 256, 'own'), (2, 1, 33, 128, 'none'),
            (4, 2, 37, 70, 'shared, shifted'), (2, 2, 37, 256, 'own'), (4, 1, 33, 128, 'none'),
            (6, 2, 13, 16, 'local'), (6, 1, 7, 9, 'none, shifted'),
        ]),
    ],
)  # fmt: skip
def test_values_and_all_gradients(constants, dtype, roles, batch, n, s, rope):
    small = {
        'QUERIES_KEYS': tile_sizes.QUERIES_KEYS._replace(numbers=256),
        'QUERIES_KEYS_GRADIENT': tile_sizes.QUERIES_KEYS_GRADIENT._replace(numbers=256, max_programs=3),
        'QUERIES_KEYS_GRADIENT_SHIFTED': tile_sizes.QUERIES_KEYS_GRADIENT_SHIFTED._replace(max_programs=3),
    }
    constants(host.queries_and_keys, tile_sizes, **small)
    generator = np.random.default_rng(0)
    shapes = [(batch, n, s), (batch, n, 3), (s,), (roles, s), (roles, s), (s,), (roles, batch, n, s)]
    *args, weights = (jnp.asarray(generator.standard_normal(shape)) for shape in shapes)
    rope, _, shifted = rope.partition(', ')
    # Rows of a batch are texts of their own, and some tokens begin another document.
    follows = jnp.asarray((np.arange(n) > 0) * (generator.random((batch, n)) < 0.7), jnp.float32) if shifted else None
    table = None if rope == 'none' else rope_table(positions(rope, batch, n), s, dtype='float64')
    rotated = 2 if rope == 'local' else roles
    wanted = values_and_gradients('reference', 'float64', args, weights, table, follows, rotated)
    narrow = jax.tree.map(lambda x: x.astype('float32'), (args, weights, table))
    found = values_and_gradients('triton', dtype, *narrow, follows, rotated)
    assert [x.dtype for x in found[1]] == [dtype, dtype, *['float32'] * 4]
    for role, (a, b) in enumerate(zip(found[0], wanted[0], strict=True)):
        assert max_error(np.asarray(a, np.float64), b) < TOLERANCE[dtype], role
    for name, a, b in zip(NAMES, found[1], wanted[1], strict=True):
        if name == 'mix' and not shifted:
            continue
        assert max_error(np.asarray(a, np.float64), b) < TOLERANCE[dtype], name


def test_gradients_of_all_columns_come_back_in_one_buffer():
    p, vector, scales = (jnp.zeros(shape, 'float32') for shape in ((1, 4, 7 + 16), (16,), (6, 16)))

    def loss(p):
        roles, p = host.queries_and_keys(p, vector, scales, scales, None, rotated=0)
        return sum(y.sum() for y in roles) + p[..., :7].sum()

    # What the other reader's columns become is whole once; nothing of this size is added up behind the kernels.
    program = str(jax.make_jaxpr(jax.grad(loss))(p))
    assert 'f32[1,4,23] = pad' in program
    assert 'f32[1,4,23] = add_any' not in program
