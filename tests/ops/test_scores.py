import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.scores import (
    ATTENTION_FUNCTIONS,
    SMOOTH_RELU_EPSILON,
    SOFTMAXES,
    Scoring,
    attention_weights,
    smooth_relu2,
)
from tests.numerics import normal
from tests.ops import oracle


@pytest.mark.parametrize('name', sorted(ATTENTION_FUNCTIONS))
def test_functions_are_the_formulas(name):
    x = np.linspace(-1.5, 1.5, 61)
    expected = [oracle.FUNCTIONS[name](value) for value in x]
    np.testing.assert_allclose(ATTENTION_FUNCTIONS[name](jnp.asarray(x)), expected, atol=1e-13)


def test_laplace_is_not_zero_at_zero():
    np.testing.assert_allclose(ATTENTION_FUNCTIONS['laplace'](0.0), 0.006, atol=5e-4)


@pytest.mark.parametrize(
    ('end', 'value', 'slope'), [(-1, 0.0, 0.0), (1, SMOOTH_RELU_EPSILON**2, 2 * SMOOTH_RELU_EPSILON)]
)
def test_smooth_relu2_is_continuously_differentiable(end, value, slope):
    x, step = end * SMOOTH_RELU_EPSILON, 1e-9
    for side in (-step, step):
        np.testing.assert_allclose(smooth_relu2(x + side), value, atol=1e-9)
        np.testing.assert_allclose(jax.grad(smooth_relu2)(x + side), slope, atol=1e-7)


@pytest.mark.parametrize('function', [*sorted(ATTENTION_FUNCTIONS), *SOFTMAXES])
def test_masked_weights_are_exactly_zero(function):
    q, k = normal(0, 3, 4), normal(1, 5, 4)
    mask = jnp.asarray([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    weights = attention_weights(q, k, scoring=Scoring(function), sequence_length=5, mask=mask)
    assert (np.asarray(weights)[~np.asarray(mask)] == 0).all()
    assert np.isfinite(weights).all()
    assert (weights[2] != 0).sum() >= 2
    gradient = jax.grad(
        lambda q: attention_weights(q, k, scoring=Scoring(function), sequence_length=5, mask=mask).sum()
    )(q)
    assert np.isfinite(gradient).all()
    assert (gradient[1] == 0).all()


def test_softmax_plus_sharpens_with_the_keys_that_a_query_sees():
    q, k = normal(0, 2, 4), normal(1, 512, 4)
    mask = jnp.stack([jnp.arange(512) < 512, jnp.arange(512) < 8])
    plus, plain = (attention_weights(q, k, scoring=Scoring(f), sequence_length=512, mask=mask) for f in SOFTMAXES[::-1])
    np.testing.assert_allclose(plus[0], plain[0], rtol=1e-6)
    sharpened = jax.nn.softmax(q[1] @ k[:8].T / 2 * jnp.log(8) / jnp.log(512))
    np.testing.assert_allclose(plus[1, :8], sharpened, rtol=1e-6)


def test_scores_are_float32_for_bfloat16():
    q, k = (normal(seed, 3, 4).astype(jnp.bfloat16) for seed in (0, 1))
    assert attention_weights(q, k, scoring=Scoring(), sequence_length=3).dtype == jnp.float32
