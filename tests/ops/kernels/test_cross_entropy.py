"""The kernel of the vocabulary loss against the plain formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.cross_entropy import loss_and_gradient
from gau.ops.kernels import cross_entropy as fused
from tests.numerics import max_error
from tests.ops.kernels.conftest import DTYPES, TOLERANCE


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('shape', 'vocab'), [((2, 3), 50), pytest.param((1, 5), 16, marks=pytest.mark.slow)])
def test_loss_and_gradient(dtype, shape, vocab):
    generator = np.random.default_rng(0)
    logits = jnp.asarray(30 * generator.standard_normal((*shape, vocab)))
    targets = jnp.asarray(generator.integers(0, vocab, shape))
    weights = jnp.asarray(generator.standard_normal(shape)).at[0, 0].set(0)
    expected = loss_and_gradient(logits, targets, weights, dtype='float64')
    narrow = logits.astype('float32'), targets, weights.astype('float32')
    for a, b in zip(fused.loss_and_gradient(*narrow, dtype=dtype), expected, strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype]
