"""The kernels of attention to chosen earlier chunks against the reference in float64, values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import far_chunks as reference
from gau.ops import gated_mixed_chunk as gated_reference
from gau.ops.chunk_states import into_chunks
from gau.ops.kernels import far_chunks as host
from gau.ops.kernels import gated_mixed_chunk as gated_host
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import Scoring
from tests.numerics import max_error
from tests.ops.kernels.conftest import DTYPES, SEGMENT_LAYOUTS, TOLERANCE

LAYOUTS = {
    **SEGMENT_LAYOUTS,
    'nothing': lambda n: jnp.zeros((2, n), jnp.int32),
}


@jax.custom_vjp
def attend(far, v):
    return host.attend(far, v)[0]


def attend_forward(far, v):
    o, log_sum = host.attend(far, v)
    return o, (far, v, log_sum)


attend.defvjp(attend_forward, lambda residuals, do: host.gradients(*residuals, do))


def in_kernels(q, k, v, *, chunk_size, chunks, segment_ids_BN=None):
    n, size = v.shape[1], min(chunk_size, v.shape[1])
    ids = jnp.ones((1, n), jnp.int32) if segment_ids_BN is None else segment_ids_BN
    q, k, v, ids = (into_chunks(x, size) for x in (q, k, v, ids))
    o = attend(host.choose(q, k, ids, chunks), v)
    return o.reshape(o.shape[0], -1, o.shape[-1])[:, :n]


OPS = {
    'reference': lambda *x, **fields: reference.far_chunks(*x, **fields, impl='reference'),
    'triton': in_kernels,
}


def inputs(*, n, s, e):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (2, n, width), jnp.float64) for key, width in zip(keys, (s, s, e, e), strict=True)]


def value_and_gradients(impl, arrays, weights, **fields):
    def loss(arrays):
        o = OPS[impl](*arrays, **fields)
        return jnp.sum(o.astype(weights.dtype) * weights), o

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return o, *gradients


def expect_the_reference(dtype, n, s, e, chunk, chunks, packed):
    ids, fields = LAYOUTS[packed](n), {'chunk_size': chunk, 'chunks': chunks}
    # Rounded to begin with, so that both compute the same.
    *arrays, weights = (x.astype(dtype) for x in inputs(n=n, s=s, e=e))
    if ids is not None:
        # What stands at padding reaches nothing.
        arrays = [jnp.where((ids == 0)[..., None], 100, x).astype(dtype) for x in arrays]
    exact = [x.astype('float64') for x in (*arrays, weights)]
    wanted = value_and_gradients('reference', exact[:-1], exact[-1], segment_ids_BN=ids, **fields)
    found = value_and_gradients('triton', arrays, weights, segment_ids_BN=ids, **fields)
    for name, a, b in zip(('o', 'q', 'k', 'v'), found, wanted, strict=True):
        assert a.dtype == dtype
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype], name


CASES = [
    # What sticks out of a tile of C, S and E; the last chunk has fewer tokens.
    (30, 8, 24, 8, 2, 'documents'),
    (37, 17, 33, 3, 4, 'one row'),
    (40, 8, 24, 5, 3, 'padding'),
    # All chunks before, of which there are fewer than asked for.
    (28, 8, 24, 8, 100, 'none'),
    (24, 4, 16, 6, 2, 'nothing'),
    # Several tiles of C.
    (150, 12, 72, 40, 2, 'documents'),
]
SLOW = [
    (150, 12, 72, 40, 2, 'none'),
    (96, 16, 64, 16, 3, 'none'),
    (90, 70, 20, 70, 1, 'short'),
    (90, 16, 40, 16, 1, 'one row'),
    (160, 8, 24, 5, 6, 'padding'),
]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('n', 's', 'e', 'chunk', 'chunks', 'packed'),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_values_and_all_gradients(dtype, n, s, e, chunk, chunks, packed):
    expect_the_reference(dtype, n, s, e, chunk, chunks, packed)


@pytest.mark.parametrize('packed', ['documents', 'none'])
def test_bfloat16_in_the_interpreter_too(packed):
    expect_the_reference('bfloat16', 37, 17, 33, 12, 2, packed)


def dense(q, k, v, ids, chosen_BGI):
    """Attention with a 1 in the sum to what stands in the chosen chunks; all of it one matrix of weights."""
    seen = chosen_BGI[:, :, None, :, None] & (ids[:, :, :, None, None] == ids[:, None, None]) & (ids > 0)[:, None, None]
    weights = jnp.where(seen, jnp.exp(jnp.einsum('BGCS,BIDS->BGCID', q, k) * q.shape[-1] ** -0.5), 0)
    weights /= 1 + weights.sum((3, 4), keepdims=True)
    return jnp.einsum('BGCID,BIDE->BGCE', weights, v)


def test_chunks_that_all_others_read_or_none():
    size, keys = 6, jax.random.split(jax.random.key(1), 4)
    q, k, v, do = (jax.random.normal(key, (2, 5, size, 12), 'float32') for key in keys)
    ids = jnp.ones((2, 5, size), jnp.int32).at[0, 2, 3:].set(2).at[1, 1, :2].set(0)
    # Behind the places that count stand chunks that are not read.
    index = jnp.asarray([[[4, 4], [0, 3], [0, 1], [0, 2], [0, 3]], [[0, 0], [0, 0], [1, 1], [2, 1], [3, 1]]], jnp.int32)
    count = jnp.asarray([[0, 1, 2, 2, 1], [0, 1, 0, 2, 2]], jnp.int32)
    read = jnp.arange(2) < count[..., None]
    chosen = (jax.nn.one_hot(index, 5, dtype=bool) & read[..., None]).any(2)
    exact = [x.astype('float64') for x in (q, k, v, do)]
    wanted, pull = jax.vjp(lambda *x: dense(*x, ids, chosen), *exact[:3])
    found, pull_found = jax.vjp(lambda q, k, v: attend(host.Far(q, k, ids, index, count), v), q, k, v)
    for a, b in zip((found, *pull_found(do)), (wanted, *pull(exact[3])), strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE['float32']

    order, starts = (np.asarray(x) for x in host.readers_of_chunks(index, count))
    readers = [[[*map(int, order[b, starts[b, i] : starts[b, i + 1]])] for i in range(5)] for b in range(2)]
    assert readers == [[[2, 4, 6, 8], [5], [7], [], []], [[2], [7, 9], [6], [8], []]]


def test_what_all_gradients_of_a_query_have_in_common_cancels():
    """In bfloat16 as well: with the sum of do o, which is rounded, errors are twenty times as large."""
    q, k, v, weights = inputs(n=64, s=8, e=250)
    # Values that are much alike, and a gradient with a direction of its own.
    alike_E = jax.random.uniform(jax.random.key(2), 250, jnp.float64, 0.5, 1.5)
    arrays = [x.astype('bfloat16') for x in (3 * q, k, alike_E + 0.3 * v, 0.1 + 0.1 * weights)]
    exact, fields = [x.astype('float64') for x in arrays], {'chunk_size': 16, 'chunks': 3}
    wanted = value_and_gradients('reference', exact[:3], exact[3], **fields)
    found = value_and_gradients('triton', arrays[:3], arrays[3], **fields)
    for a, b in zip(found[1:3], wanted[1:3], strict=True):
        difference = np.asarray(a, np.float64) - np.asarray(b)
        assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(b)


def test_scores_of_any_size_have_finite_gradients():
    q, k, v, weights = (x.astype('float32') for x in inputs(n=30, s=8, e=24))
    for factor in (1e4, -1e4):
        found = value_and_gradients('triton', [factor * q, jnp.abs(k), v], weights, chunk_size=8, chunks=2)
        assert all(np.isfinite(x).all() for x in found)


def test_queries_that_are_no_numbers_are_not_hidden():
    q, k, v, _ = (x.astype('float32') for x in inputs(n=30, s=8, e=24))
    o = in_kernels(q.at[0, 20].set(jnp.nan), k, v, chunk_size=8, chunks=2)
    assert np.isnan(o[0, 20]).all()
    assert np.isfinite(np.delete(o, 20, axis=1)[:, :24]).all()


GATED = [
    (44, 6, 2, 'documents', {}),
    (44, 6, 3, 'padding', {'window': 2}),
    # Two chunks, without states; one, which has none before it.
    (23, 12, 2, 'documents', {}),
    (10, 16, 2, 'none', {}),
]
SLOW_GATED = [
    (100, 40, 2, 'none', {}),
    (45, 6, 4, 'one row', {'window': 2, 'global_reduction': 'sum'}),
    (44, 12, 2, 'none', {'scoring': Scoring('softmax', None)}),
]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('n', 'chunk', 'chunks', 'packed', 'fields'),
    [*GATED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_GATED)],
)
def test_far_chunks_in_the_gated_matmul(dtype, n, chunk, chunks, packed, fields):
    ids, size = LAYOUTS[packed](n), n if n <= chunk else fields.get('window', 1) * chunk
    shapes = [(2, n, 2 * 24 + 70), (2, 24), *[(2, n, 8)] * 6, (2 * size - 1,), (2, n, 1), (2, n, 24)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # Rounded to begin with, so that both compute the same.
    *args, weights = (
        jax.random.normal(key, shape, dtype).astype('float64') for key, shape in zip(keys, shapes, strict=True)
    )
    spec = ChunkSpec(**{'chunk_size': chunk, 'causal': True, 'scoring': Scoring('relu2', 'fixed', 8)} | fields)

    def value_and_gradients(op, dtype):
        def loss(args):
            p, bias, *queries_keys, bias_P, gate = args
            arrays = [x.astype(dtype) for x in (p, *queries_keys)]
            o = op(
                *(arrays[0], bias, *arrays[1:5]),
                spec=spec,
                segment_ids_BN=ids,
                bias_P=bias_P,
                gate_BN1=gate,
                far_BNS=arrays[5:],
                far_chunks=chunks,
            )
            return jnp.sum(o * weights), o

        wide = 'float64' if dtype == 'float64' else 'float32'
        (_, o), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))([x.astype(wide) for x in args])
        return o, *gradients

    wanted = value_and_gradients(gated_reference.gated_mixed_chunk, 'float64')
    found = value_and_gradients(gated_host.gated_mixed_chunk, dtype)
    names = ('o', 'p', 'bias', 'q', 'k', 'q_lin', 'k_lin', 'q_far', 'k_far', 'bias_P', 'gate')
    valid = np.broadcast_to(True if ids is None else ids > 0, (2, n))
    for name, a, b in zip(names, found, wanted, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        # What stands at padding in `p` is the caller's, and its gradient means nothing.
        a, b = (x[valid] if name == 'p' else x for x in (a, b))
        assert max_error(a, b) < TOLERANCE[dtype], name
