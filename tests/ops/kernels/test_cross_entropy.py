"""The kernel of the vocabulary loss against the plain formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.cross_entropy import loss_and_gradient
from gau.ops.kernels import cross_entropy as fused
from tests.numerics import max_error
from tests.ops.kernels.conftest import DTYPES, TOLERANCE


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
    expected = loss_and_gradient(logits, targets, weights, dtype='float64')
    wide = jnp.pad(logits, ((0, 0), (0, 0), (0, more)), constant_values=jnp.nan).astype('float32')
    expected = expected[0], jnp.pad(expected[1], ((0, 0), (0, 0), (0, more)))
    results = fused.loss_and_gradient(wide, targets, weights.astype('float32'), vocab_size=vocab, dtype=dtype)
    for a, b in zip(results, expected, strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype]
