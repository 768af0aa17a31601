"""The kernel of the vocabulary loss against the plain formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.cross_entropy import loss_and_gradient, padded_vocabulary, weighted_cross_entropy
from gau.ops.kernels import cross_entropy as fused
from tests.numerics import max_error
from tests.ops.kernels.conftest import DTYPES, TOLERANCE


@pytest.mark.parametrize(('vocab', 'rows'), [(50, 128), (128, 128), (129, 256)])
def test_products_have_whole_rows_of_the_matrix_units(vocab, rows):
    e = jnp.ones((vocab, 4))
    padded = padded_vocabulary(e, fused.COLUMNS)
    assert padded.shape == (rows, 4)
    assert padded.sum() == e.sum()
    operands = jnp.ones((2, 3, 4)), e, jnp.zeros((2, 3), int), jnp.ones((2, 3))
    loss = functools.partial(weighted_cross_entropy, positions_per_slice=2, slice_loss=fused.FUSED)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*operands))
    products = [line for line in text.splitlines() if 'dot_general' in line]
    assert len(products) == 3
    assert all(f'{rows}' in line for line in products[::2])


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('shape', 'vocab', 'more'), [((2, 3), 50, 0), ((1, 2), 50, 78), pytest.param((1, 5), 16, 0, marks=pytest.mark.slow)]
)
def test_loss_and_gradient(dtype, shape, vocab, more):
    """`more` columns hold what is not to be read."""
    generator = np.random.default_rng(0)
    logits = jnp.asarray(30 * generator.standard_normal((*shape, vocab)))
    targets = jnp.asarray(generator.integers(0, vocab, shape))
    weights = jnp.asarray(generator.standard_normal(shape)).at[0, 0].set(0)
    expected = loss_and_gradient(logits, targets, weights, vocab_size=vocab, dtype='float64')
    wide = jnp.pad(logits, ((0, 0), (0, 0), (0, more)), constant_values=jnp.nan).astype('float32')
    expected = expected[0], jnp.pad(expected[1], ((0, 0), (0, 0), (0, more)))
    results = fused.loss_and_gradient(wide, targets, weights.astype('float32'), vocab_size=vocab, dtype=dtype)
    for a, b in zip(results, expected, strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype]
