import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.positions import apply_rope, bias_matrix, rope_table, rotary_bias, sinusoid, toeplitz_bias
from tests.numerics import normal
from tests.ops import oracle

POSITIONS = np.array([0, 1, 2, 7, 100, 5000])


def test_rope_is_the_formula():
    x = normal(0, 1, 6, 8)
    y = apply_rope(x, rope_table(POSITIONS[None], 8, dtype=jnp.float64))
    expected = [oracle.rope(np.asarray(row), p) for row, p in zip(x[0], POSITIONS, strict=True)]
    np.testing.assert_allclose(y[0], expected, atol=1e-13)
    heads = apply_rope(jnp.stack([x, 2 * x], axis=1), rope_table(POSITIONS[None], 8, dtype=jnp.float64))
    np.testing.assert_allclose(heads[0, 1], 2 * y[0], atol=1e-13)


def test_rope_makes_products_relative():
    q, k = normal(0, 8), normal(1, 8)
    table = rope_table(jnp.arange(40)[None], 8, dtype=jnp.float64)
    q, k = (apply_rope(jnp.broadcast_to(x, (1, 40, 8)), table)[0] for x in (q, k))
    np.testing.assert_allclose(q[3] @ k[10], q[25] @ k[32], atol=1e-12)
    assert abs(q[3] @ k[10] - q[10] @ k[3]) > 1e-3


def test_rope_is_computed_in_float32_for_bfloat16():
    table = rope_table(jnp.asarray([[8191]]), 4, dtype=jnp.bfloat16)
    assert table[0].dtype == jnp.float32
    np.testing.assert_allclose(table[0][0, 0, 0], np.cos(8191), atol=1e-3)
    assert apply_rope(jnp.ones((1, 1, 4), jnp.bfloat16), table).dtype == jnp.bfloat16


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match='even width, not 5'):
        rope_table(jnp.arange(3)[None], 5)
    with pytest.raises(ValueError, match='even width, not 5'):
        sinusoid(jnp.arange(3)[None], 5)


def test_sinusoid_concatenates_halves():
    y = sinusoid(POSITIONS[None], 6, dtype=jnp.float64)[0]
    for row, p in zip(y, POSITIONS, strict=True):
        angles = [p * 10000.0 ** (-i / 3) for i in range(3)]
        np.testing.assert_allclose(row, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-12)


@pytest.mark.parametrize(('length', 'n'), [(1, 1), (5, 5), (9, 5), (9, 1)])
def test_toeplitz_bias_reads_its_table(length, n):
    w = normal(0, 2 * length - 1)
    expected = oracle.toeplitz(np.asarray(w), n)
    np.testing.assert_array_equal(bias_matrix(toeplitz_bias(w, n), n, n), expected)
    for first in range(0, n, 2):
        rows = min(2, n - first)
        np.testing.assert_array_equal(
            bias_matrix(toeplitz_bias(w, n), rows, n, first=first), expected[first : first + rows]
        )
    # Its gradient counts how often an entry is read.
    gradient = jax.grad(lambda w: bias_matrix(toeplitz_bias(w, n), n, n).sum())(w)
    reads = [max(0, n - abs(i - (length - 1))) for i in range(2 * length - 1)]
    np.testing.assert_array_equal(gradient, reads)


def test_toeplitz_bias_refuses_a_short_table():
    with pytest.raises(ValueError, match='for 3 positions cannot serve 4'):
        toeplitz_bias(jnp.zeros(5), 4)


def test_rotary_bias_is_the_formula_and_relative():
    a, c = normal(0, 6), normal(1, 6)
    b = bias_matrix(rotary_bias(a, c, 9), 9, 9)
    np.testing.assert_allclose(b, oracle.rotary(np.asarray(a), np.asarray(c), 9), atol=1e-12)
    np.testing.assert_allclose(b[1, 4], b[5, 8], atol=1e-12)
    np.testing.assert_allclose(bias_matrix(rotary_bias(a, c, 4), 4, 4), b[:4, :4], atol=1e-12)
