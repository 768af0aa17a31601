"""The fused kernels of FLASH against the reference in float64, values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import gated_mixed_chunk as reference
from gau.ops.kernels import chunk_pairs, gated_mixed_chunk, quadratic_weights, tile_sizes
from gau.ops.kernels import gated_chunks as host
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import Scoring
from tests.numerics import max_error
from tests.ops.kernels.conftest import (
    DTYPES,
    GATES,
    SEGMENT_LAYOUTS,
    TOLERANCE,
    documents,
    expect_gates_to_have_their_gradient,
)

LAYOUTS = {
    **SEGMENT_LAYOUTS,
    # The last row of a split: so many chunks of padding that halves of halves over them are no float32 any more.
    'mostly padding': lambda n: jnp.where(jnp.arange(n) < jnp.asarray([[20], [9]]), 1, 0),
}
OPS = {'reference': reference.gated_mixed_chunk, 'triton': gated_mixed_chunk.gated_mixed_chunk}
REDUCTIONS = {
    'mean': {'global_reduction': 'mean'},
    'sum': {'global_reduction': 'sum'},
}
SCORINGS = {'relu2': Scoring('relu2', 'fixed', 8), 'softmax': Scoring('softmax', None)}
NAMES = ('p', 'bias', 'q', 'k', 'q_lin', 'k_lin', 'bias_P')


def inputs(seed, *, batch, n, s, e, chunk):
    keys = jax.random.split(jax.random.key(seed), len(NAMES) + 1)
    # Columns of p that belong to another reader, more than a tile has.
    shapes = [(batch, n, 2 * e + 70), (2, e), *[(batch, n, s)] * 4, (2 * chunk - 1,)]
    draws = [jax.random.normal(key, shape, jnp.float64) for key, shape in zip(keys, shapes, strict=False)]
    return draws, jax.random.normal(keys[-1], (batch, n, e), jnp.float64)


def value_and_gradients(impl, dtype, args, weights, *, ids, **fields):
    """Returns the output and the gradients of `args`, which may end with a gate's logits; fields of `ChunkSpec`."""

    def loss(args):
        p, bias, *queries_keys, bias_P = args[: len(NAMES)]
        o = OPS[impl](
            p.astype(dtype),
            bias,
            *(x.astype(dtype) for x in queries_keys),
            spec=ChunkSpec(**{'scoring': SCORINGS['relu2']} | fields),
            segment_ids_BN=ids,
            bias_P=bias_P,
            gate_BN1=args[-1] if len(args) > len(NAMES) else None,
        )
        return jnp.sum(o * weights), o

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
    return o, gradients


QUICK = {
    # Parts of one chunk (two, both ways); what sticks out of a tile of C, S and E.
    (30, 8, 12, 24, 'documents', 8, 'mean'): (('relu2', False),),
    (28, 8, 8, 24, 'none', 4, 'mean'): (),
    # Two chunks, without states, and with them where S is small; a text shorter than a chunk.
    (66, 40, 24, 40, 'none', 1, 'mean'): (('relu2', True),),
    (23, 12, 8, 24, 'documents', 1, 'mean'): (('relu2', True), ('softmax', False)),
    (23, 12, 4, 24, 'documents', 1, 'mean'): (('relu2', False),),
    (10, 16, 8, 24, 'none', 1, 'mean'): (('relu2', True),),
    (40, 5, 8, 24, 'padding', 8, 'mean'): (),
    (36, 6, 8, 24, 'padding', 5, 'sum'): (('relu2', True),),
    (24, 12, 8, 40, 'one row', 1, 'sum'): (),
    (16, 16, 8, 24, 'one row', 1, 'mean'): (),
    (48, 16, 16, 32, 'none', 1, 'mean'): (),
    (100, 40, 12, 72, 'documents', 1, 'mean'): (),
    (90, 16, 8, 40, 'documents', 6, 'mean'): (),
    (72, 16, 8, 40, 'none', 6, 'sum'): (),
    (37, 3, 17, 33, 'one row', 5, 'mean'): (),
    (90, 70, 70, 20, 'short', 1, 'mean'): (),
}
CASES = [
    pytest.param(*case, causal, function, marks=() if (function, causal) in quick else pytest.mark.slow)
    for case, quick in QUICK.items()
    for causal in (True, False)
    for function in SCORINGS
]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(('n', 'chunk', 's', 'e', 'packed', 'min_programs', 'reduction', 'causal', 'function'), CASES)
def test_values_and_all_gradients(constants, dtype, n, chunk, s, e, packed, min_programs, reduction, causal, function):
    constants(OPS['triton'], tile_sizes, **with_programs(min_programs))
    args, weights = inputs(0, batch=2, n=n, s=s, e=e, chunk=min(chunk, n))
    fields = {'chunk_size': chunk, 'causal': causal, 'scoring': SCORINGS[function]} | REDUCTIONS[reduction]
    expect_the_reference(dtype, args, weights, LAYOUTS[packed](n), **fields)


@pytest.mark.slow
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('function', list(SCORINGS))
def test_bfloat16_in_the_interpreter_too(function, causal):
    args, weights = inputs(0, batch=2, n=37, s=17, e=33, chunk=12)
    fields = {'chunk_size': 12, 'causal': causal, 'scoring': SCORINGS[function]}
    expect_the_reference('bfloat16', args, weights, documents(37), **fields)


def with_programs(number):
    """Tiles of the scans that make at least so many programs, of four warps each."""
    return {
        name: {dtype: tiles._replace(min_warps=4 * number) for dtype, tiles in getattr(tile_sizes, name).items()}
        for name in ('STATES', 'STATES_GRADIENT')
    }


def expect_the_reference(dtype, args, weights, ids, **fields):
    if ids is not None:
        # What stands at padding is not cleared, and must not be found anywhere.
        args = [jnp.where((ids == 0)[..., None], 100.0, x) if x.ndim == 3 else x for x in args]
    # Rounded to begin with, so that both compute the same.
    args = [x.astype(dtype).astype('float64') if x.ndim == 3 else x for x in args]
    weights = weights.astype(dtype).astype('float64')
    wanted = value_and_gradients('reference', 'float64', args, weights, ids=ids, **fields)
    narrow = jax.tree.map(lambda x: x.astype('float32'), (args, weights))
    found = value_and_gradients('triton', dtype, *narrow, ids=ids, **fields)
    valid = np.broadcast_to(True if ids is None else ids > 0, weights.shape[:2])
    # What stands at padding in `p` is the caller's, and its gradient means nothing.
    names = ('o', *NAMES, 'gate')[: len(args) + 1]
    for name, a, b in zip(names, (found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        if name == 'p':
            a, b = a[valid], b[valid]
        assert max_error(a, b) < TOLERANCE[dtype], name


def test_what_all_gradients_of_a_softmax_have_in_common_cancels():
    """Its gradient is that of differences, in bfloat16 as well, where rounded weights do not sum to 1."""
    n, width = 40, 8
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.standard_normal((2, n, width)), 'bfloat16') for _ in range(2))
    bias_P = jnp.asarray(generator.standard_normal(2 * n - 1), 'float32')
    # Eighths, which bfloat16 has up to 32.
    da = jnp.asarray(generator.integers(-8, 9, (2, n, n)) / 8, 'bfloat16')
    fields = {'scoring': SCORINGS['softmax'], 'causal': True, 'sequence_length': n, 'width': width}
    tokens = quadratic_weights.describe_tokens(None, (2, n), **fields)
    weights = jax.jit(lambda q, k, bias_P: quadratic_weights.whole_weights(q, k, bias_P, tokens, True))
    pull = jax.vjp(weights, q, k, bias_P)[1]
    for a, b, tolerance in zip(pull(da + 20), pull(da), (2e-2, 2e-2, 1e-4), strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b, np.float64)) < tolerance


WINDOWS = [
    # Parts of one chunk; what sticks out of a tile.
    (40, 6, 12, 'documents', 7, 'scalar', {}),
    # Two chunks have no states, and a chunk alone has no other.
    (23, 12, 8, 'none', 1, 'none', {'scoring': Scoring('relu2', 'paper')}),
    (480, 3, 4, 'mostly padding', 4, 'scalar', {}),
]
SLOW_WINDOWS = [
    (60, 8, 12, 'documents', 8, 'scalar', {}),
    (45, 6, 8, 'documents', 1, 'scalar', {'global_reduction': 'sum'}),
    (10, 16, 8, 'none', 1, 'scalar', {'scoring': Scoring('relu2', 'paper')}),
    (50, 12, 8, 'padding', 2, 'none', {'scoring': Scoring('relu2', 'visible')}),
    (64, 16, 8, 'none', 1, 'none', {'scoring': Scoring('relu2', 'su')}),
    (90, 40, 24, 'short', 1, 'none', {}),
    (100, 40, 12, 'documents', 1, 'scalar', {'scoring': SCORINGS['softmax']}),
    (64, 16, 8, 'none', 1, 'none', {'scoring': Scoring('softmax_plus', None)}),
    (60, 3, 8, 'padding', 8, 'scalar', {'scoring': SCORINGS['softmax']}),
    (60, 4, 8, 'one row', 5, 'scalar', {'global_reduction': 'sum'}),
    (60, 3, 8, 'padding', 8, 'scalar', {}),
    # Tiles as large as they are on a GPU.
    (400, 128, 16, 'none', 1, 'scalar', {}),
]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    ('n', 'chunk', 's', 'packed', 'min_programs', 'gate', 'fields'),
    [*WINDOWS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_WINDOWS)],
)
def test_a_window_of_two_chunks(constants, dtype, n, chunk, s, packed, min_programs, gate, fields):
    constants(OPS['triton'], tile_sizes, **with_programs(min_programs))
    args, weights = inputs(0, batch=2, n=n, s=s, e=24, chunk=n if n <= chunk else 2 * chunk)
    if gate != 'none':
        # Chunks that keep their state, that forget it, and both one after the other.
        kept_N1 = jnp.asarray([3.0, -6.0, 1.0, 2.0, -2.0])[jnp.arange(n) // chunk % 5, None]
        args.append(kept_N1 + jax.random.normal(jax.random.key(1), (2, n, 1), jnp.float64))
    fields = {'chunk_size': chunk, 'causal': True, 'window': 2} | fields
    expect_the_reference(dtype, args, weights, LAYOUTS[packed](n), **fields)


@pytest.mark.parametrize(
    ('groups', 'size', 'state', 'directions', 'window', 'has_states', 'cross_chunk'),
    [
        (1, 8, 4, 1, 1, False, 0),
        (2, 8, 4, 1, 1, False, 1),
        (2, 8, 4, 2, 1, False, 2),
        (2, 9, 4, 1, 1, True, 0),
        (2, 9, 4, 1, 2, False, 0),
        (3, 8, 4, 1, 1, True, 0),
    ],
)
def test_which_sequences_have_no_states(groups, size, state, directions, window, has_states, cross_chunk):
    p, q = jnp.zeros((1, groups, size, 6)), jnp.zeros((1, groups, size, directions * state))
    a = jnp.zeros((1, groups, size, window * size))
    sizes = host._Sizes.of(p, jnp.zeros((2, 3)), a, q, jnp.ones((1, groups, directions)))
    assert (sizes.has_states, sizes.cross_chunk) == (has_states, cross_chunk)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('directions', [1, 2])
def test_weights_on_the_other_chunk_and_their_gradients(dtype, directions):
    size, state = 70, 12
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key, (3, 2, size, directions * state), dtype) for key in keys[:2])
    scale = jax.random.uniform(keys[2], (3, 2, directions), jnp.float32, 0.5, 2)
    dx = jax.random.normal(keys[3], (3, directions, size, size), dtype)

    def reference(q, k):
        # The second chunk reads the first in the forward direction, the first one the second in reverse.
        x = [
            jnp.einsum('BCS,BKS->BCK', q[:, 1 - j, :, part], k[:, j, :, part]) * scale[:, 1 - j, j, None, None]
            for j, part in ((1, slice(state, None)), (0, slice(state)))[2 - directions :]
        ]
        return jnp.stack(x, axis=1)

    wanted, pull = jax.vjp(reference, q.astype('float64'), k.astype('float64'))
    found = chunk_pairs.weights_on_other_chunk(q, k, scale)
    gradients = chunk_pairs.gradients_of_queries_and_keys(q, k, scale, dx)
    for a, b in zip((found, *gradients), (wanted, *pull(dx.astype('float64'))), strict=True):
        assert a.dtype == dtype
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype]


@pytest.mark.parametrize('gates', GATES, ids=str)
def test_gates_that_are_zero_have_their_gradient(gates):
    args, weights = inputs(0, batch=2, n=16, s=8, e=24, chunk=8)
    fields = {'chunk_size': 8, 'causal': True, 'ids': None}

    def compare(args):
        narrow = jax.tree.map(lambda x: x.astype('float32'), (args, weights))
        wanted = value_and_gradients('reference', 'float64', args, weights, **fields)
        found = value_and_gradients('triton', 'float32', *narrow, **fields)
        return (wanted[0], *wanted[1]), (found[0], *found[1])

    expect_gates_to_have_their_gradient(gates, 0, args, compare, ('o', *NAMES))
