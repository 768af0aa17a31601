"""FLASH's Pallas kernels for TPUs against the reference in float64, interpreted on a CPU: values and all gradients."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import gated_mixed_chunk as reference
from gau.ops.kernels import gated_mixed_chunk as fast
from gau.ops.kernels import tpu_gated_chunks
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import Scoring
from tests.models.tiny import compile_fast
from tests.numerics import max_error
from tests.programs import report

NAMES = ('p', 'bias', 'q', 'k', 'q_lin', 'k_lin', 'bias_P', 'gate')
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv('GAU_PALLAS_INTERPRET', '1')
    with jax.default_matmul_precision('highest'):
        yield


def documents(n):
    """Documents that end inside chunks and one that spans several, with padding at two places."""
    first = np.repeat([1, 2, 3, 4], [3, n // 2, n // 8, n - 3 - n // 2 - n // 8])
    first[-(n // 8) :] = 0
    return np.stack([first, np.repeat([7, 0, 5, 6], [n // 3, n // 6, 2, n - 2 - n // 3 - n // 6])])


def padding(n):
    """Chunks of nothing else, within a document and before one."""
    return np.where(np.array([[1] * n, [0] * n]) == np.arange(n) // (n // 4) % 2, 0, 3)


def value_and_gradients(op, dtype, args, weights, *, spec, ids):
    @compile_fast
    def run(args, weights):
        def loss(args):
            p, bias, q, k, q_lin, k_lin, bias_P, *gate = args
            o = op(
                *(p.astype(dtype), bias, *(x.astype(dtype) for x in (q, k, q_lin, k_lin))),
                spec=spec,
                segment_ids_BN=ids,
                bias_P=bias_P,
                gate_BN1=gate[0] if gate else None,
            )
            return jnp.sum(o * weights), o

        return jax.value_and_grad(loss, has_aux=True)(args)

    (_, o), gradients = run(args, weights)
    return o, *gradients


# Sizes that no tile divides, three blocks of E, a sequence shorter than a chunk, chunks of padding.
@pytest.mark.parametrize(('causal', 'n', 'chunk', 's', 'layout', 'function', 'reduction', 'dtype', 'gate'), [
    pytest.param(True, 30, 8, 12, documents, 'relu2', 'mean', 'float32', True, marks=pytest.mark.slow),
    pytest.param(False, 30, 8, 12, documents, 'softmax', 'mean', 'float32', False, marks=pytest.mark.slow),
    (True, 10, 16, 8, None, 'softmax', 'mean', 'float32', False),
    (True, 30, 8, 12, documents, 'relu2', 'mean', 'bfloat16', False),
    pytest.param(True, 30, 8, 12, documents, 'relu2', 'mean', 'float32', False, marks=pytest.mark.slow),
    pytest.param(False, 40, 5, 8, padding, 'relu2', 'sum', 'float32', False, marks=pytest.mark.slow),
    pytest.param(True, 37, 16, 8, None, 'laplace', 'sum', 'float32', False, marks=pytest.mark.slow),
    pytest.param(False, 37, 16, 8, None, 'relu2', 'mean', 'float32', False, marks=pytest.mark.slow),
    pytest.param(True, 40, 5, 17, padding, 'softmax', 'mean', 'float32', False, marks=pytest.mark.slow),
    pytest.param(False, 30, 8, 12, documents, 'softmax', 'mean', 'bfloat16', False, marks=pytest.mark.slow),
    pytest.param(True, 40, 5, 17, padding, 'softmax', 'sum', 'float32', True, marks=pytest.mark.slow),
    pytest.param(True, 37, 8, 12, None, 'relu2', 'mean', 'float32', True, marks=pytest.mark.slow),
    pytest.param(True, 30, 8, 12, documents, 'relu2', 'mean', 'bfloat16', True, marks=pytest.mark.slow),
])  # fmt: skip
def test_values_and_all_gradients(constants, causal, n, chunk, s, layout, function, reduction, dtype, gate):
    expect_the_reference(constants, causal, n, chunk, s, layout, function, reduction, dtype, gate)


def expect_the_reference(constants, causal, n, chunk, s, layout, function, reduction, dtype, gate, *, window=1):
    e = 24
    constants(fast.gated_mixed_chunk, tpu_gated_chunks, BLOCKS=(8,))
    rng = np.random.default_rng(0)
    positions = n if n <= chunk else window * chunk
    # Columns of p that belong to another reader.
    shapes = [(2, n, 3 * e), (2, e), *[(2, n, s)] * 4, (2 * positions - 1,)] + [(2, n, 1)] * gate
    args, weights = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes], rng.standard_normal((2, n, e))
    ids = None if layout is None else jnp.asarray(layout(n), jnp.int32)
    if ids is not None:
        # What stands at padding is not cleared, and must not be found anywhere.
        args = [jnp.where((ids == 0)[..., None], 100.0, x) if x.ndim == 3 else x for x in args]
    spec = ChunkSpec(chunk, _scoring(function), causal, global_reduction=reduction, window=window)
    fields = {'spec': spec, 'ids': ids}
    wanted = value_and_gradients(reference.gated_mixed_chunk, 'float64', args, weights, **fields)
    op = functools.partial(fast.gated_mixed_chunk, kernels='pallas')
    with jax.enable_x64(False):
        narrow = jax.tree.map(lambda x: jnp.asarray(x, 'float32'), (args, weights))
        found = value_and_gradients(op, dtype, *narrow, **fields)
    valid = np.broadcast_to(True if ids is None else ids > 0, (2, n))
    for name, a, b in zip(('o', *NAMES[: len(args)]), found, wanted, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        if name == 'p':
            assert (a[..., 2 * e :] == 0).all()
            a, b = a[valid], b[valid]
        assert max_error(a, b) < TOLERANCE[dtype], name


def _scoring(function):
    return Scoring(function, None) if function == 'softmax' else Scoring(function, 'fixed', 8)


# All causal. Fewer than three chunks of a document give a gate nothing to do.
WINDOWS = [
    (40, 5, 12, documents, 'relu2', 'mean', 'float32', True),
]
SLOW_WINDOWS = [
    (37, 16, 8, None, 'relu2', 'mean', 'float32', False),
    (53, 13, 8, None, 'softmax', 'mean', 'float32', True),
    (30, 8, 12, documents, 'softmax', 'sum', 'float32', False),
    (30, 8, 12, documents, 'relu2', 'mean', 'bfloat16', False),
    (40, 5, 12, documents, 'relu2', 'mean', 'bfloat16', True),
    (40, 5, 17, padding, 'relu2', 'sum', 'float32', True),
    (40, 5, 8, padding, 'laplace', 'mean', 'float32', False),
    # Two chunks, and a sequence shorter than a chunk.
    (23, 12, 8, documents, 'relu2', 'mean', 'float32', False),
    (10, 16, 8, None, 'relu2', 'mean', 'float32', False),
]


@pytest.mark.parametrize(
    ('n', 'chunk', 's', 'layout', 'function', 'reduction', 'dtype', 'gate'),
    [*WINDOWS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_WINDOWS)],
)
def test_a_window_of_two_chunks(constants, n, chunk, s, layout, function, reduction, dtype, gate):
    expect_the_reference(constants, True, n, chunk, s, layout, function, reduction, dtype, gate, window=2)


@pytest.mark.slow
def test_chunks_over_devices_give_the_same():
    found = report('tests.ops.sharded_pallas')
    assert len(found) == 13
    for case, difference in found.items():
        assert difference < 1e-5, case


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_kernels_compile_for_tpus(topology):
    assert report('tests.ops.tpu_kernels', topology) == {
        **{f'splash {width}': 3 for width in (64, 96, 128, 256)},
        # The output, the gradients of queries and of values; without causality each for two scans.
        'flash base': 3,
        'flash bidirectional': 6,
        'flash large': 3,
        'flash narrow': 6,
        **{f'flash {name}': 3 for name in ('gated', 'gated large', 'gated narrow')},
        **{f'flash {name}': 3 for name in ('window', 'window large', 'window narrow')},
        'flash_quad base': 3,
        'flash_quad large': 3,
        'flash_quad narrow': 3,
        # Of two layers; FLASH's have a state and its gradient for the other chip, too.
        'step flash': 10,
        'step flash gated': 10,
        'step flash window': 10,
        'step flash_quad': 6,
        'step transformer_plus_plus': 6,
    }
