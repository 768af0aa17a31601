import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gau.ops import chunk_states
from gau.ops.mixed_chunk_attention import ChunkSpec, mixed_chunk_attention
from gau.ops.positions import bias_matrix
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring
from tests.numerics import LAYOUTS, finite_difference, max_error, normal
from tests.ops import oracle

N, S, E, C = 24, 4, 6, 5
CONTIGUOUS = {name: ids for name, ids in LAYOUTS.items() if name != 'short'}


def inputs(n=N, s=S, e=E, batch=1, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((batch, n, width)) for width in (s, s, s, s, e)]


@functools.partial(jax.jit, static_argnames=('chunk_size', 'scoring', 'causal', 'branches', 'global_reduction', 'impl'))
def apply(arrays, bias, ids=None, *, chunk_size=C, scoring=Scoring(), causal=True, impl='xla', **more):  # noqa: B008
    if ids is not None:
        ids = jnp.broadcast_to(jnp.asarray(ids), arrays[0].shape[:2])
    spec = ChunkSpec(chunk_size, scoring, causal, **more)
    return mixed_chunk_attention(*arrays, spec=spec, segment_ids_BN=ids, bias_CC=bias, impl=impl)


@functools.partial(jax.jit, static_argnames=('chunk_size', 'scoring', 'causal', 'branches', 'global_reduction', 'impl'))
def values_and_gradients(arrays, bias, ids, c, **options):
    def loss(arrays, bias):
        y = apply(arrays, bias, ids, **options)
        return (y * c).sum(), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, bias)


BIAS = 0.3 * np.random.default_rng(9).standard_normal((C, C))


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_values_are_the_formula(causal, impl):
    x = inputs()
    for ids in (None, LAYOUTS['packed'], LAYOUTS['holes']):
        expected = oracle.mixed_chunk(*(a[0] for a in x), chunk=C, causal=causal, ids=ids, bias=BIAS)
        np.testing.assert_allclose(apply(x, BIAS, ids, causal=causal, impl=impl)[0], expected, atol=1e-12)


@pytest.mark.parametrize('options', [
    {'function': 'softmax', 'normalizer': None}, {'normalizer': 'fixed'}, {'normalizer': 'visible'},
    {'normalizer': 'su'}, {'branches': 'local'}, {'branches': 'global'}, {'reduction': 'sum'},
    {'function': 'laplace'},
], ids=str)  # fmt: skip
def test_options_are_the_formula(options):
    x = inputs()
    scoring = Scoring(options.get('function', 'relu2'), options.get('normalizer', 'paper'), 7)
    rest = {
        'branches': options.get('branches', 'both'),
        'global_reduction': options.get('reduction', 'mean'),
        'scoring': scoring,
    }
    for causal, ids in ((True, LAYOUTS['packed']), (False, LAYOUTS['holes'])):
        expected = oracle.mixed_chunk(
            *(a[0] for a in x), chunk=C, causal=causal, ids=ids, bias=BIAS, fixed_length=7, **options
        )
        for impl in ('reference', 'xla'):
            y = apply(x, BIAS, ids, causal=causal, impl=impl, **rest)
            np.testing.assert_allclose(y[0], expected, atol=1e-12)


@pytest.mark.parametrize('causal', [True, False])
def test_gradients_are_the_formula(causal):
    x, ids, c = inputs(), LAYOUTS['packed'], np.random.default_rng(5).standard_normal((N, E))

    def slow(*args):
        *arrays, bias = args
        return (oracle.mixed_chunk(*(a[0] for a in arrays), chunk=C, causal=causal, ids=ids, bias=bias) * c).sum()

    expected, direction = finite_difference(slow, (*x, BIAS), 1)
    for impl in ('reference', 'xla'):
        gradients, bias_gradient = values_and_gradients(x, BIAS, ids, c, causal=causal, impl=impl)[1]
        along = sum((g * d).sum() for g, d in zip([*gradients, bias_gradient], direction, strict=True))
        np.testing.assert_allclose(along, expected, rtol=1e-6)


@pytest.mark.parametrize('causal', [True, False])
def test_chunked_form_equals_the_reference(causal):
    every_layout = np.stack(list(CONTIGUOUS.values()))
    for chunk_size in (1, C, 100):
        bias = normal(6, 24, 24)
        for ids in (None, every_layout) if chunk_size == C else (every_layout,):
            x, c = inputs(batch=len(every_layout)), normal(5, 1, N, E)
            reference, fast = (
                values_and_gradients(x, bias, ids, c, chunk_size=chunk_size, causal=causal, impl=impl)
                for impl in ('reference', 'xla')
            )
            assert max_error(fast, reference) < 1e-12


@st.composite
def problems(draw):
    n = draw(st.integers(1, 33))
    lengths = draw(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0, 1, 1, 1])), min_size=1, max_size=9))
    ids, document = [], 0
    for length, is_document in lengths:
        document += is_document
        ids += [document * is_document] * length
    ids = (ids + [document + 1] * n)[:n]
    shape = {'n': n, 's': draw(st.sampled_from([2, 3, 8])), 'e': draw(st.sampled_from([1, 5]))}
    return shape, ids, draw(st.integers(1, 40)), draw(st.booleans()), draw(st.sampled_from(['float32', 'float64']))


@hypothesis.given(problems())
@hypothesis.settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
def test_chunked_form_equals_the_reference_on_any_layout(problem):
    shape, ids, chunk_size, causal, dtype = problem
    x = [jnp.asarray(a, dtype) for a in inputs(**shape)]
    reference, fast = (
        apply(x, None, np.asarray([ids]), chunk_size=chunk_size, causal=causal, impl=impl)
        for impl in ('reference', 'xla')
    )
    assert fast.dtype == reference.dtype == dtype
    tolerance = 1e-12 if dtype == 'float64' else 1e-5
    np.testing.assert_allclose(fast, reference, atol=tolerance * max(1, float(jnp.abs(reference).max())))


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('group', [1, 5])
def test_many_chunks_go_by_groups(causal, group, constants):
    constants(mixed_chunk_attention, chunk_states, GROUP=group)
    ids = np.stack([*CONTIGUOUS.values(), LAYOUTS['packed'][::-1]])
    x, c = inputs(batch=len(ids)), normal(5, 1, N, E)

    def loss(x, impl):
        spec = ChunkSpec(2, Scoring(), causal, branches='global', global_reduction='sum')
        y = mixed_chunk_attention(*x, spec=spec, segment_ids_BN=jnp.asarray(ids), impl=impl)
        return (y * c).sum(), y

    reference, fast = (
        jax.jit(jax.value_and_grad(lambda x, impl=impl: loss(x, impl), has_aux=True))(x)
        for impl in ('reference', 'xla')
    )
    assert max_error(fast, reference) < 1e-12


def test_states_are_carried_over_more_than_one_group():
    # 600 chunks of 2: beyond GROUP without touching it.
    n = 1200
    x = inputs(n=n, s=2, e=2)
    ids = np.repeat([1, 2, 3], [700, 3, 497])[None]
    for causal in (True, False):
        options = {'chunk_size': 2, 'causal': causal}
        np.testing.assert_allclose(
            apply(x, None, ids, **options, impl='xla'), apply(x, None, ids, **options, impl='reference'), atol=1e-11
        )


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_poisoned_padding_reaches_nothing(causal, impl):
    x, ids = inputs(), LAYOUTS['holes']
    padded = np.asarray(ids) == 0
    c = np.where(padded[:, None], 0, np.random.default_rng(5).standard_normal((N, E)))
    poisoned = [np.where(padded[None, :, None], np.nan, a) for a in x]
    options = {'causal': causal, 'impl': impl}
    clean = values_and_gradients(x, BIAS, ids, c, **options)
    dirty = values_and_gradients(poisoned, BIAS, ids, c, **options)
    assert max_error(dirty, clean) == 0


def test_first_chunk_has_no_global_term():
    y = apply(inputs(), BIAS, branches='global', impl='xla')
    assert (y[:, :C] == 0).all()
    assert (y[:, C:] != 0).all()
    gradient = values_and_gradients(inputs(), BIAS, None, 1.0, branches='global', impl='xla')[1]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_bidirectional_global_branch_is_linear_attention():
    x = inputs()
    q, k, v = (x[i][0] for i in (2, 3, 4))
    y = apply(x, None, causal=False, branches='global', impl='xla')
    np.testing.assert_allclose(y[0], (q @ k.T / N) @ v, atol=1e-12)


@pytest.mark.parametrize('causal', [True, False])
def test_one_chunk_is_quadratic_attention(causal):
    x, bias_P = inputs(), normal(7, 2 * N - 1)
    bias = bias_matrix(bias_P, N, N)
    scoring = Scoring('relu2', 'fixed', 9)
    y = apply(x, bias, chunk_size=30, branches='local', causal=causal, scoring=scoring, impl='xla')
    expected = quadratic_attention(
        x[0], x[1], jnp.asarray(x[4]), scoring=scoring, causal=causal, bias_P=bias_P, impl='reference'
    )
    np.testing.assert_allclose(y, expected, atol=1e-13)


@pytest.mark.parametrize('causal', [True, False])
def test_a_token_alone(causal):
    x = inputs(n=1)
    assert max_error(apply(x, BIAS, causal=causal, impl='xla'), apply(x, BIAS, causal=causal, impl='reference')) < 1e-13
    assert (apply(x, BIAS, np.zeros((1, 1), int), causal=causal, impl='xla') == 0).all()


def test_batch_entries_are_independent():
    x = inputs(batch=3)
    ids = np.stack([LAYOUTS[name] for name in ('packed', 'holes', 'right padding')])
    y = apply(x, BIAS, ids, impl='xla')
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(apply([a[order] for a in x], BIAS, ids[order], impl='xla'), y[order], atol=1e-13)
