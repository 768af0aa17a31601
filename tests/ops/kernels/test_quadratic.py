"""The kernels of quadratic attention against the reference in float64 (see test_gated_chunks)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import quadratic_attention as reference
from gau.ops.kernels import gated_quadratic, tile_sizes
from gau.ops.kernels import quadratic as host
from gau.ops.scores import Scoring
from tests.numerics import max_error
from tests.ops.kernels.conftest import BOTH_DTYPES, GATES, TOLERANCE, documents, expect_gates_to_have_their_gradient

OPS = {
    'reference': {
        'plain': functools.partial(reference.quadratic_attention, impl='reference'),
        'gated': reference.gated_quadratic_attention,
    },
    'triton': {'plain': host.quadratic_attention, 'gated': gated_quadratic.gated_quadratic_attention},
}
RELU2, SOFTMAX = Scoring('relu2', 'fixed', 8), Scoring('softmax', None)
NAMES = {'plain': ('q', 'k', 'bias', 'v'), 'gated': ('q', 'k', 'bias', 'p', 'bias of uv')}


def program(impl, dtype, **fields):
    """Returns f(args, weights) -> (_, output), gradients of args."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(args, weights):
        q, k, bias_P, *rest = args
        q, k, values = (x.astype(dtype) for x in (q, k, rest[0]))
        if len(rest) == 2:
            o = OPS[impl]['gated'](values, rest[1], q, k, bias_P=bias_P, **fields)
        else:
            o = OPS[impl]['plain'](q, k, values, bias_P=bias_P, **fields)
        return jnp.sum(o * weights), o

    return run


def value_and_gradients(impl, dtype, args, weights, **fields):
    (_, o), gradients = program(impl, dtype, **fields)(args, weights)
    return o, gradients


@pytest.mark.parametrize('dtype', BOTH_DTYPES)
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('op', list(NAMES))
@pytest.mark.parametrize(
    ('n', 's', 'e', 'packed', 'function', 'normalizer'),
    [
        (20, 12, 20, True, 'relu2', 'visible'),
        (10, 8, 24, False, 'relu2', 'su'),
        (20, 12, 20, True, 'softmax', None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (20, 16, 16, False, 'relu2', 'su'),
                (32, 16, 16, False, 'relu2', 'fixed'),
                (45, 12, 20, True, 'relu2', 'visible'),
                (70, 8, 24, True, 'relu2', 'paper'),
                (64, 8, 8, False, 'relu2', 'su'),
                (10, 8, 24, False, 'softmax', None),
                (70, 8, 24, True, 'softmax', None),
                (70, 24, 200, False, 'softmax', None),
                (45, 12, 20, True, 'softmax_plus', None),
                (64, 8, 8, False, 'softmax_plus', None),
            )
        ),
    ],
)
def test_values_and_all_gradients(constants, monkeypatch, dtype, op, causal, n, s, e, packed, function, normalizer):
    # Tiles that are no squares, in few programs with several each; and one tile of one sequence a program.
    sides = ((32, 16), (32, 16), (16, 32)) if packed else ((16, 16), (16, 16), (16, 16))
    for name, (block_m, block_n) in zip(('WEIGHTS', 'LOG_SUMS', 'WEIGHTS_GRADIENT'), sides, strict=True):
        tiles = tile_sizes.WeightsTiles(block_m, block_n, 4, 1, min_programs=1 if packed else 528)
        monkeypatch.setattr(tile_sizes, name, {dtype: tiles})
    # Blocks of 16 in up to two groups, so that there are scans, ends that stick out, and blocks alone.
    small = {'SMALLEST_BLOCK': 16, 'LARGEST_BLOCK': 16, 'GROUPS': 2}
    constants(OPS['triton'][op], host, **small)
    generator = np.random.default_rng(0)
    # Projections have columns of another reader, more than a tile has.
    values = {'plain': [(2, n, e)], 'gated': [(2, n, 2 * e + 140), (2, e)]}[op]
    shapes = [(2, n, s), (2, n, s), (2 * n - 1,), *values, (2, n, e)]
    *args, weights = (jnp.asarray(generator.standard_normal(shape)) for shape in shapes)
    ids = documents(n) if packed else None
    fields = {'scoring': Scoring(function, normalizer, 8), 'causal': causal, 'segment_ids_BN': ids}
    wanted = value_and_gradients('reference', 'float64', args, weights, **fields)
    narrow = jax.tree.map(lambda x: x.astype('float32'), (args, weights))
    found = value_and_gradients('triton', dtype, *narrow, **fields)
    # The gradient of a softmax is a difference of two numbers, both made of what was rounded. XLA's is 0.023 off here.
    tolerance = TOLERANCE[dtype] * (2 if function != 'relu2' and dtype == 'bfloat16' else 1)
    for name, a, b in zip(('o', *NAMES[op]), (found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < tolerance, name


@pytest.mark.parametrize(
    ('op', 'scoring'),
    [
        ('plain', RELU2),
        ('gated', RELU2),
        ('plain', SOFTMAX),
        pytest.param('gated', SOFTMAX, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_nan_is_not_hidden(op, scoring):
    """The relu of a NaN is NaN, in values and in the gradient: a maximum on a GPU makes it 0."""
    n, s, e = 20, 8, 16
    generator = np.random.default_rng(0)
    values = {'plain': [(1, n, e)], 'gated': [(1, n, 2 * e + 5), (2, e)]}[op]
    shapes = [(1, n, s), (1, n, s), (2 * n - 1,), *values, (1, n, e)]
    *clean, weights = (jnp.asarray(generator.standard_normal(shape), 'float32') for shape in shapes)
    programs = [program(impl, 'float32', scoring=scoring, causal=True) for impl in OPS]
    for which, name in enumerate(('q', 'k', 'bias')):
        args = list(clean)
        # A token in the middle, and the bias of a distance that some see.
        args[which] = args[which].at[(0, n // 2, 0) if name != 'bias' else n - 1 - n // 2].set(jnp.nan)
        ((_, wanted), wanted_gradients), ((_, found), found_gradients) = (run(args, weights) for run in programs)
        rows = np.isnan(wanted).any(-1)
        assert rows.any()
        assert np.isnan(found).any(-1)[rows].all()
        pairs = zip(NAMES[op], found_gradients, wanted_gradients, strict=True)
        assert not [other for other, a, b in pairs if np.isnan(b).any() and not np.isnan(a).any()]


@pytest.mark.parametrize('gates', GATES, ids=str)
def test_gates_that_are_zero_have_their_gradient(gates):
    n, s, e = 16, 8, 24
    generator = np.random.default_rng(0)
    shapes = [(2, n, s), (2, n, s), (2 * n - 1,), (2, n, 2 * e + 5), (2, e), (2, n, e)]
    *args, weights = (jnp.asarray(generator.standard_normal(shape)) for shape in shapes)
    fields = {'scoring': RELU2, 'causal': True}

    def compare(args):
        narrow = jax.tree.map(lambda x: x.astype('float32'), (args, weights))
        wanted = value_and_gradients('reference', 'float64', args, weights, **fields)
        found = value_and_gradients('triton', 'float32', *narrow, **fields)
        return (wanted[0], *wanted[1]), (found[0], *found[1])

    expect_gates_to_have_their_gradient(gates, 3, args, compare, ('o', *NAMES['gated']))
