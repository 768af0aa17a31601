import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import quadratic_attention as module
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring
from tests.numerics import LAYOUTS, finite_difference, max_error, normal
from tests.ops import oracle

N, S, E = 24, 4, 6
SCORINGS = [
    *(('relu2', normalizer) for normalizer in ('paper', 'fixed', 'visible', 'su')),
    *((function, 'visible') for function in ('laplace', 'softplus2', 'smooth_relu2')),
    ('softmax', None),
]


@pytest.fixture(scope='module')
def arrays():
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, N, width)) for width in (S, S, E)], 0.3 * generator.standard_normal(2 * N - 1)


def apply(arrays, bias, *, impl='reference', ids=None, **options):
    ids = None if ids is None else jnp.asarray([ids])
    return quadratic_attention(*arrays, bias_P=bias, segment_ids_BN=ids, impl=impl, **options)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('function', 'normalizer'), SCORINGS)
def test_values_are_the_formula(arrays, function, normalizer, causal):
    (q, k, v), bias = arrays
    for ids in (None, LAYOUTS['packed'], LAYOUTS['holes']):
        y = apply((q, k, v), jnp.asarray(bias), ids=ids, causal=causal, scoring=Scoring(function, normalizer, 7))
        expected = oracle.quadratic(
            q[0],
            k[0],
            v[0],
            causal=causal,
            ids=ids,
            function=function,
            normalizer=normalizer,
            fixed_length=7,
            bias=oracle.toeplitz(bias, N),
        )
        np.testing.assert_allclose(y[0], expected, atol=1e-12)


@pytest.mark.parametrize(('function', 'normalizer'), [('relu2', 'paper'), ('relu2', 'su'), ('softmax', None)])
def test_gradients_are_the_formula(arrays, function, normalizer):
    (q, k, v), bias = arrays
    ids, c = LAYOUTS['packed'], np.random.default_rng(5).standard_normal((N, E))

    def slow(q, k, v, bias):
        options = {'function': function, 'normalizer': normalizer, 'bias': oracle.toeplitz(bias, N)}
        return (oracle.quadratic(q[0], k[0], v[0], causal=True, ids=ids, **options) * c).sum()

    def fast(q, k, v, bias):
        return (apply((q, k, v), bias, ids=ids, causal=True, scoring=Scoring(function, normalizer))[0] * c).sum()

    expected, direction = finite_difference(slow, (q, k, v, bias), 1)
    gradient = jax.grad(fast, (0, 1, 2, 3))(*map(jnp.asarray, (q, k, v, bias)))
    np.testing.assert_allclose(
        sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)), expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    ('scoring', 'ids'),
    [
        (Scoring('relu2', 'visible'), None),
        (Scoring('relu2', 'paper'), LAYOUTS['holes']),
        (Scoring('softmax', None), LAYOUTS['holes']),
    ],
    ids=['visible', 'paper', 'softmax'],
)
def test_blocks_of_queries_equal_the_reference(arrays, ids, scoring, constants):
    constants(quadratic_attention, module, QUERY_BLOCK=5)
    x, bias = arrays

    def loss(x, bias, impl):
        y = apply(x, bias, impl=impl, ids=ids, causal=True, scoring=scoring)
        return (y**2).sum(), y

    results = [
        jax.value_and_grad(loss, (0, 1), has_aux=True)(list(map(jnp.asarray, x)), jnp.asarray(bias), impl)
        for impl in ('reference', 'xla')
    ]
    assert max_error(results[1], results[0]) < 1e-13


@pytest.mark.parametrize(
    'scoring', [Scoring('relu2', 'paper'), Scoring('laplace', 'visible'), Scoring('softmax', None)]
)
def test_poisoned_padding_reaches_nothing(arrays, scoring):
    x, bias = arrays
    ids = LAYOUTS['holes']
    padded = np.asarray(ids) == 0
    poisoned = [jnp.where(padded[None, :, None], jnp.nan, a) for a in x]

    def loss(x, bias):
        y = apply(x, bias, ids=ids, causal=False, scoring=scoring)
        return (y[0][~padded] ** 2).sum(), y

    clean, dirty = (
        jax.value_and_grad(loss, (0, 1), has_aux=True)(list(a), jnp.asarray(bias))
        for a in (map(jnp.asarray, x), poisoned)
    )
    assert max_error(dirty, clean) == 0


def test_one_token():
    q, k, v = normal(0, 1, 1, S), normal(1, 1, 1, S), normal(2, 1, 1, E)
    y = quadratic_attention(q, k, v, scoring=Scoring('softmax', None), causal=True)
    np.testing.assert_allclose(y, v)


def test_scores_of_several_heads_are_bounded_together(constants):
    # Sequences short enough to be one block for one head.
    b, heads, n = 2, 8, 128
    operands = [normal(i, b, n, heads, width) for i, width in enumerate((S, S, E))]

    def run(x, heads):
        one = functools.partial(quadratic_attention, scoring=Scoring('relu2', 'fixed'), causal=True, heads=heads)
        return (jax.vmap(one, 2, 2)(*x) ** 2).sum()

    def compiled(heads):
        return jax.jit(jax.value_and_grad(functools.partial(run, heads=heads))).lower(operands).compile()

    scores = b * heads * n * n
    constants(quadratic_attention, module, MAX_SCORES=scores // 16)
    whole, blocks = compiled(1), compiled(heads)
    memory = [program.memory_analysis().temp_size_in_bytes for program in (whole, blocks)]
    size = operands[0].dtype.itemsize
    assert memory[0] >= scores * size, 'of one head these are few'
    assert memory[1] < scores * size / 2
    assert max_error(blocks(operands), whole(operands)) < 1e-13
