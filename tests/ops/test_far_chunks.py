"""Exact attention to chosen earlier chunks: the formula token by token, its gradient, and what must reach nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.far_chunks import far_chunks
from tests.numerics import LAYOUTS, finite_difference, max_error, normal

N, S, E, C = 24, 4, 3, 3


def by_hand(q, k, v, ids, chunks):
    """One sequence, token by token."""
    chunk, out = np.arange(len(v)) // C, np.zeros(v.shape)
    for t in range(len(v)):
        mine = {i: [s for s in range(len(v)) if chunk[s] == i and ids[s] == ids[t] > 0] for i in range(chunk[t])}
        asking = q[mine[chunk[t] - 1]].mean(0) if mine.get(chunk[t] - 1) else np.zeros(S)
        keys = {i: k[members].mean(0) for i, members in mine.items() if members}
        order = sorted(keys, key=lambda i: (i != chunk[t] - 1, -(asking @ keys[i]), i))
        terms = [(np.exp(q[t] @ (k[s] + keys[i]) / np.sqrt(S)), v[s]) for i in order[:chunks] for s in mine[i]]
        out[t] = sum((w * x for w, x in terms), np.zeros(E)) / (1 + sum(w for w, _ in terms))
    return out


def inputs(batch=1):
    generator = np.random.default_rng(0)
    return [generator.standard_normal((batch, N, width)) for width in (S, S, E)]


# Compiles much and runs little.
compile_fast = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.partial(compile_fast, static_argnames=('chunks', 'impl'))
def values_and_gradients(arrays, ids, *, chunks=2, impl='xla'):
    def loss(arrays):
        o = far_chunks(*arrays, chunk_size=C, chunks=chunks, segment_ids_BN=ids, impl=impl)
        return (o * normal(5, N, E)).sum(), o

    (_, o), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return o, gradients


@pytest.mark.parametrize('chunks', [2, 100])
def test_values_are_the_formula_and_gradients_agree(chunks):
    arrays, ids = inputs(len(LAYOUTS)), np.asarray(list(LAYOUTS.values()))
    expected = np.stack([by_hand(*(x[row] for x in arrays), ids[row], chunks) for row in range(len(ids))])
    reference = values_and_gradients(arrays, ids, chunks=chunks, impl='reference')
    assert max_error(reference[0], expected) < 1e-12
    # Documents in one piece; those that are not are no longer any.
    ids = np.where([name != 'short' for name in LAYOUTS], ids.T, 0).T
    reference, fast = (values_and_gradients(arrays, ids, chunks=chunks, impl=impl) for impl in ('reference', 'xla'))
    assert max_error(fast, reference) < 1e-12


def test_gradients_are_those_of_the_formula():
    arrays, ids = inputs(), np.asarray([LAYOUTS['packed']])
    c = np.asarray(normal(5, N, E))
    expected, direction = finite_difference(lambda *x: (by_hand(*(a[0] for a in x), ids[0], 2) * c).sum(), arrays, 1)
    gradients = values_and_gradients(arrays, ids)[1]
    found = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_later_tokens_and_the_tokens_of_the_own_chunk_change_nothing():
    # Not by their gradients alone: a choice of chunks has none.
    arrays, ids = inputs(), None
    before = values_and_gradients(arrays, ids)[0]
    assert max_error(before[0], by_hand(*(x[0] for x in arrays), [1] * N, 2)) < 1e-12
    for t in (3, 7, 17):
        changed = [np.where(np.arange(N)[:, None] >= t, 9 * np.asarray(normal(t, *x.shape)), x) for x in arrays]
        after = values_and_gradients(changed, ids)[0]
        assert max_error(after[:, :t], before[:, :t]) < 1e-14
        assert max_error(after[:, t:], before[:, t:]) > 1e-3


def test_poisoned_padding_reaches_nothing_and_bfloat16_is_near():
    arrays, ids = inputs(), np.asarray([LAYOUTS['holes']])
    poisoned = [np.where(ids[..., None] == 0, np.nan, x) for x in arrays]
    clean = values_and_gradients(arrays, ids)
    assert max_error(values_and_gradients(poisoned, ids), clean) == 0
    # Of all chunks, so that rounding makes no other choice.
    halves = jax.tree.map(lambda x: jnp.asarray(x, 'bfloat16'), arrays)
    exact = jax.tree.map(lambda x: x.astype('float64'), halves)
    found, expected = (values_and_gradients(x, ids, chunks=8) for x in (halves, exact))
    assert found[0].dtype == jnp.bfloat16
    assert max_error(jax.tree.map(lambda x: x.astype('float64'), found), expected) < 0.03


def test_scores_of_any_size_have_finite_gradients():
    q, k, v = inputs()
    for q_scaled in (1e3 * q, -1e3 * np.abs(q)):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(values_and_gradients([q_scaled, np.abs(k), v], None)))
