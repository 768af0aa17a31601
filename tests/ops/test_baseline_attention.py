"""Performer, Linformer and Combiner against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import chunk_states
from gau.ops import linear_attention as linear_module
from gau.ops.combiner import combiner_attention
from gau.ops.linear_attention import favor_features, linear_attention, orthogonal_directions, relu_features
from gau.ops.linformer import linformer_attention
from tests.numerics import LAYOUTS, max_error, normal
from tests.ops import oracle

N, K, R = 24, 4, 3
IDS = {name: LAYOUTS[name] for name in ('packed', 'holes')} | {'none': None}


def inputs(seed=0):
    return [np.random.default_rng(seed).standard_normal((1, N, K)) for _ in range(1)] + [
        np.random.default_rng(seed + i).standard_normal((1, N, K)) for i in (1, 2)
    ]


def ids_array(ids):
    return None if ids is None else jnp.asarray([ids])


def performer(q, k, v, ids_BN, causal, impl):
    q, k = relu_features(q), relu_features(k)
    return linear_attention(q, k, v, causal=causal, segment_ids_BN=ids_BN, impl=impl)


def linformer(q, k, v, ids_BN, causal, impl):
    e, f = normal(7, 1, N, R), normal(8, 1, N, R)
    return linformer_attention(q, k, v, e, f, segment_ids_BN=ids_BN, impl=impl)


def combiner(q, k, v, ids_BN, causal, impl):
    return combiner_attention(q, k, v, row_length=5, causal=causal, segment_ids_BN=ids_BN)


def expected(op, q, k, v, ids, causal):
    q, k, v = (np.asarray(x[0]) for x in (q, k, v))
    if op is performer:
        return oracle.linear(np.maximum(q, 0) + 1e-3, np.maximum(k, 0) + 1e-3, v, causal=causal, ids=ids)
    if op is linformer:
        return oracle.linformer(q, k, v, np.asarray(normal(7, N, R)), np.asarray(normal(8, N, R)), ids=ids)
    return oracle.combiner(q, k, v, row=5, causal=causal, ids=ids)


CASES = [(performer, True), (performer, False), (linformer, False), (combiner, True), (combiner, False)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(linear_module, 'CHUNK', 5)
    monkeypatch.setattr(chunk_states, 'GROUP', 3)


@pytest.mark.parametrize(('op', 'causal'), CASES)
def test_values_gradients_and_poison(op, causal):
    x = inputs()

    @functools.partial(jax.jit, static_argnums=2)
    def run(x, ids_BN, impl):
        def loss(x):
            y = op(*x, ids_BN, causal, impl)
            return (jnp.where(True if ids_BN is None else ids_BN[..., None] > 0, y, 0) ** 2).sum(), y

        return jax.value_and_grad(loss, has_aux=True)(x)

    for ids in IDS.values():
        ids_BN = ids_array(ids)
        results = []
        for impl in ('reference',) if op is combiner else ('reference', 'xla'):
            clean = run([jnp.asarray(a) for a in x], ids_BN, impl)
            np.testing.assert_allclose(clean[0][1][0], expected(op, *x, ids, causal), atol=1e-12)
            if ids is not None:
                padded = ids_BN[..., None] == 0
                assert max_error(run([jnp.where(padded, jnp.nan, a) for a in x], ids_BN, impl), clean) == 0
            results.append(clean)
        assert max_error(results[-1], results[0]) < 1e-12


def test_combiner_of_one_row_is_softmax_attention():
    q, k, v = inputs()
    y = combiner_attention(q, k, jnp.asarray(v), row_length=N, causal=True)
    np.testing.assert_allclose(
        y[0], oracle.quadratic(q[0], k[0], v[0], causal=True, function='softmax', normalizer=None), atol=1e-12
    )


def test_directions_are_orthogonal_and_always_the_same():
    w = orthogonal_directions(10, 4, 2)
    assert w.shape == (2, 10, 4)
    np.testing.assert_array_equal(w, orthogonal_directions(10, 4, 2))
    for head in w:
        for block in (head[:4], head[4:8]):
            products = block @ block.T
            np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-5)
    assert np.abs(w[0] - w[1]).max() > 0.1


def favor(q, k, v, w, **options):
    (phi_q, _), (phi_k, log_scale) = favor_features(q, w), favor_features(k, w)
    return linear_attention(phi_q, phi_k, v, key_log_scale_BN=log_scale, **options)


# FAVOR is its formula in a test below; this is about the formula.
@pytest.mark.slow
def test_favor_estimates_the_softmax_kernel():
    q, k, v = (0.5 * a for a in inputs())
    y = favor(q, k, jnp.asarray(v), orthogonal_directions(20_000, K, 1)[0], causal=True)
    soft = oracle.quadratic(q[0], k[0], v[0], causal=True, function='softmax', normalizer=None)
    assert max_error(y[0], soft) < 0.02


@pytest.mark.parametrize('causal', [True, False])
def test_favor_is_its_formula(causal):
    q, k, v = inputs()
    w = orthogonal_directions(6, K, 1)[0]
    phi_q, phi_k = (np.exp(x[0] @ w.T - (x[0] ** 2).sum(-1, keepdims=True) / 2) for x in (q * K**-0.25, k * K**-0.25))
    layouts = [ids for name, ids in LAYOUTS.items() if name != 'short']
    run = jax.jit(favor, static_argnames=('causal', 'impl'))
    for rows in ([None], layouts):
        formula = [oracle.linear(phi_q, phi_k, v[0], causal=causal, ids=ids) for ids in rows]
        q_BNK, k_BNK, v_BNK = (jnp.repeat(x, len(rows), axis=0) for x in (q, k, v))
        ids_BN = None if rows == [None] else jnp.asarray(rows)
        for impl in ('reference', 'xla'):
            y = run(q_BNK, k_BNK, v_BNK, w, causal=causal, segment_ids_BN=ids_BN, impl=impl)
            np.testing.assert_allclose(y, np.stack(formula), atol=1e-12)


@pytest.mark.parametrize('impl', ['reference', 'xla'])
@pytest.mark.parametrize(('std', 'width'), [
    (1, 64),
    (3, 256),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 128), (1, 256), (3, 64), (3, 128))),
])  # fmt: skip
@pytest.mark.parametrize('causal', [True, False])
def test_favor_in_float32_is_favor_in_float64(causal, std, width, impl):
    q, k = (std * normal(i, 1, 40, width).astype(jnp.float32) for i in (0, 1))
    v, weights = (normal(i, 1, 40, width).astype(jnp.float32) for i in (2, 3))
    w = orthogonal_directions(256, width, 1)[0]
    (of_q, _), (of_k, log_scale) = favor_features(q, w), favor_features(k, w)
    assert of_q.dtype == of_k.dtype == log_scale.dtype == jnp.float32

    def loss(x, impl):
        y = favor(*x, w, causal=causal, impl=impl)
        return (y * weights).sum(), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    single = run((q, k, v), impl)
    # The formula, whose exponents float64 holds.
    phi_q, phi_k = (
        np.exp(x @ w.T.astype(float) - (x**2).sum(-1, keepdims=True) / 2)
        for x in (np.asarray(x[0], float) * width**-0.25 for x in (q, k))
    )
    np.testing.assert_allclose(
        single[0][1][0], oracle.linear(phi_q, phi_k, np.asarray(v[0], float), causal=causal), atol=2e-3
    )
    double = run(tuple(x.astype(float) for x in (q, k, v)), 'reference')[1]
    for a, b in zip(single[1], double, strict=True):
        assert np.abs(b).max() > 0
        assert max_error(a, b) < 2e-3


@pytest.mark.slow
def test_later_keys_do_not_touch_the_rounding_of_earlier_ones():
    q, k, v = (x.astype(np.float32) for x in inputs())
    w = orthogonal_directions(6, K, 1)[0]
    for impl in ('reference', 'xla'):
        y, changed = (
            favor(q, k * factor, jnp.asarray(v), w, causal=True, impl=impl)
            for factor in (1, np.where(np.arange(N) < 13, 1, 9)[:, None].astype(np.float32))
        )
        np.testing.assert_array_equal(y[:, :13], changed[:, :13])


@pytest.mark.slow
def test_favor_survives_large_inputs():
    x = 30 * normal(0, 1, 64, 64).astype(jnp.float32)
    w = orthogonal_directions(256, 64, 1)[0]
    y = favor(x, x, x, w, causal=True)
    assert np.isfinite(y).all()
