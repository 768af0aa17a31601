"""Performer, Linformer and Combiner against their formulas."""

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


def performer(q, k, v, ids, causal, impl):
    q, k = relu_features(q), relu_features(k)
    return linear_attention(q, k, v, causal=causal, segment_ids_BN=ids_array(ids), impl=impl)


def linformer(q, k, v, ids, causal, impl):
    e, f = normal(7, 1, N, R), normal(8, 1, N, R)
    return linformer_attention(q, k, v, e, f, segment_ids_BN=ids_array(ids), impl=impl)


def combiner(q, k, v, ids, causal, impl):
    return combiner_attention(q, k, v, row_length=5, causal=causal, segment_ids_BN=ids_array(ids))


def expected(op, q, k, v, ids, causal):
    q, k, v = (np.asarray(x[0]) for x in (q, k, v))
    if op is performer:
        return oracle.linear(np.maximum(q, 0) + 1e-3, np.maximum(k, 0) + 1e-3, v, causal=causal, ids=ids)
    if op is linformer:
        return oracle.linformer(q, k, v, np.asarray(normal(7, N, R)), np.asarray(normal(8, N, R)), ids=ids)
    return oracle.combiner(q, k, v, row=5, causal=causal, ids=ids)


CASES = [
    (performer, True, 'reference'),
    (performer, True, 'xla'),
    (performer, False, 'reference'),
    (performer, False, 'xla'),
    (linformer, False, 'reference'),
    (linformer, False, 'xla'),
    (combiner, True, 'reference'),
    (combiner, False, 'reference'),
]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(linear_module, 'CHUNK', 5)
    monkeypatch.setattr(chunk_states, 'GROUP', 3)


@pytest.mark.parametrize(('op', 'causal', 'impl'), CASES)
def test_values_and_poison(op, causal, impl):
    for ids in IDS.values():
        x = inputs()

        def loss(x, ids=ids):
            y = op(*x, ids, causal, impl)
            valid = np.ones(N, bool) if ids is None else np.asarray(ids) > 0
            return (jnp.where(valid[:, None], y[0], 0) ** 2).sum(), y

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        clean = run([jnp.asarray(a) for a in x])
        np.testing.assert_allclose(clean[0][1][0], expected(op, *x, ids, causal), atol=1e-12)
        if ids is not None:
            padded = np.asarray(ids)[None, :, None] == 0
            assert max_error(run([jnp.where(padded, jnp.nan, a) for a in x]), clean) == 0


@pytest.mark.parametrize(('op', 'causal'), [(performer, True), (performer, False), (linformer, False)])
def test_fast_form_has_the_gradients_of_the_reference(op, causal):
    for ids in IDS.values():
        reference, fast = (
            jax.jit(jax.grad(lambda x, impl=impl, ids=ids: (op(*x, ids, causal, impl) ** 2).sum()))(inputs())
            for impl in ('reference', 'xla')
        )
        assert max_error(fast, reference) < 1e-12


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


def test_favor_estimates_the_softmax_kernel():
    q, k, v = (0.5 * a for a in inputs())
    w = orthogonal_directions(20_000, K, 1)[0]
    phi_q, phi_k = favor_features(q, w, is_query=True), favor_features(k, w, is_query=False)
    y = linear_attention(phi_q, phi_k, jnp.asarray(v), causal=True)
    soft = oracle.quadratic(q[0], k[0], v[0], causal=True, function='softmax', normalizer=None)
    assert max_error(y[0], soft) < 0.02


def test_favor_survives_large_inputs():
    x = 30 * normal(0, 1, 64, 64).astype(jnp.float32)
    w = orthogonal_directions(256, 64, 1)[0]
    phi_q, phi_k = favor_features(x, w, is_query=True), favor_features(x, w, is_query=False)
    y = linear_attention(phi_q, phi_k, x, causal=True)
    assert np.isfinite(y).all()
