"""Mixed chunk attention whose state forgets by a gate, with a window of two chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.gated_states import one_over_count
from gau.ops.mixed_chunk_attention import ChunkSpec, mixed_chunk_attention
from gau.ops.positions import bias_matrix
from gau.ops.scores import Scoring
from tests.numerics import LAYOUTS, max_error

N, S, E, C = 24, 3, 4, 3
CONTIGUOUS = [layout for name, layout in LAYOUTS.items() if name != 'short']


def inputs(batch, n=N):
    generator = np.random.default_rng(0)
    return [generator.standard_normal((batch, n, width)) for width in (S, S, S, S, E, 1)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(q, k, q_lin, k_lin, v, logits, ids, bias, spec):
    """Both branches, token by token: [N, E] each."""
    n = len(v)
    chunk = np.arange(n) // C
    kept = []
    for g in range(chunk[-1] + 1):
        real = (chunk == g) & (ids > 0)
        kept.append(sigmoid(logits[real].mean()) if real.any() else 1)
    local, far = np.zeros((n, E)), np.zeros((n, E))
    for i in range(n):
        seen = [j for j in range(i + 1) if ids[i] == ids[j] > 0]
        first = max(chunk[i] - spec.window + 1, 0)
        for j in (j for j in seen if chunk[j] >= first):
            x = q[i] @ k[j] / (C * spec.window) + bias[i - first * C, j - first * C]
            local[i] += max(x, 0) ** 2 * v[j]
        state, count = np.zeros((S, E)), 0
        for g in range(first):
            tokens = [j for j in seen if chunk[j] == g]
            state = kept[g] * state + sum((np.outer(k_lin[j], v[j]) for j in tokens), np.zeros((S, E)))
            count = kept[g] * count + len(tokens)
        far[i] = q_lin[i] @ (state / max(count, 1e-9) if spec.mean else state)
    return local, far


@functools.partial(jax.jit, static_argnames=('spec', 'impl'))
def apply(arrays, ids, bias, *, spec, impl):
    *arrays, logits = arrays
    fields = {'segment_ids_BN': ids, 'bias_CC': bias, 'gate_BN1': logits, 'impl': impl}
    return mixed_chunk_attention(*arrays, spec=spec, **fields)


RELU2 = Scoring('relu2', 'paper')


def spec_of(window, reduction='mean', scoring=RELU2):
    return ChunkSpec(C, scoring, True, global_reduction=reduction, window=window)


def relative_bias(window):
    n = window * C
    return np.asarray(bias_matrix(jnp.asarray(np.random.default_rng(1).standard_normal(2 * n - 1) + 0.5), n, n))


@pytest.mark.parametrize('impl', ['reference', 'xla'])
@pytest.mark.parametrize(('window', 'reduction'), [(1, 'mean'), (2, 'mean'), (1, 'sum')])
def test_values_are_the_formula(impl, window, reduction):
    spec, ids = spec_of(window, reduction), np.asarray(CONTIGUOUS)
    x, bias = inputs(len(ids)), relative_bias(window)
    found = apply(x, ids, bias, spec=spec, impl=impl)
    for row in range(len(ids)):
        expected = sum(by_hand(*(a[row] for a in x), ids[row], bias, spec))
        np.testing.assert_allclose(found[row], expected * (ids[row] > 0)[:, None], atol=1e-11)


@pytest.mark.parametrize('n', [N, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
@pytest.mark.parametrize('window', [1, 2])
def test_chunked_form_equals_the_reference_with_every_gradient(window, n):
    ids = np.asarray(CONTIGUOUS)[:, :n]
    x, c = inputs(len(ids), n), np.random.default_rng(1).standard_normal((n, E))
    bias = relative_bias(window if n > C else 1)

    def values_and_gradients(impl):
        def loss(x):
            y = apply(x, ids, bias, spec=spec_of(window), impl=impl)
            return (y * c).sum(), y

        return jax.value_and_grad(loss, has_aux=True)([jnp.asarray(a) for a in x])

    assert max_error(values_and_gradients('xla'), values_and_gradients('reference')) < 1e-12


@pytest.mark.parametrize('window', [1, 2])
def test_nothing_of_the_future_and_of_other_documents_reaches_a_token(window):
    ids = np.asarray([[1] * 7 + [2] * 17])
    x = [jnp.asarray(a) for a in inputs(1)]

    # With relu2 a token may see nothing.
    spec = spec_of(window, scoring=Scoring('softmax', None))

    def reach(token):
        gradient = jax.grad(lambda x: apply(x, ids, None, spec=spec, impl='xla')[0, token].sum())(x)
        return sum(np.abs(a[0]).sum(-1) for a in gradient)

    assert (reach(20)[:7] == 0).all()
    assert (reach(20)[21:] == 0).all()
    assert (reach(20)[7:21] > 0).all()
    assert (reach(5)[6:] == 0).all()


def test_what_is_left_of_a_count_after_much_padding_is_nothing():
    # 1e-40 is no normal number of float32: on a GPU 1 over it is infinite, and was NaN in every later layer.
    counts = jnp.asarray([0, 1e-40, 1e-35, 0.25, 128], jnp.float32)
    np.testing.assert_array_equal(one_over_count(counts), np.float32([1, 1, 1, 4, 1 / 128]))
