"""Quadratic attention in Pallas against the reference in float64, interpreted on a CPU: values, all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import quadratic_attention as reference
from gau.ops.kernels import tpu_quadratic
from gau.ops.scores import Scoring
from tests.models.tiny import compile_fast
from tests.numerics import LAYOUTS, max_error

TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}
PACKED = np.array([LAYOUTS['packed'], LAYOUTS['packed'][::-1]])


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv('GAU_PALLAS_INTERPRET', '1')
    with jax.default_matmul_precision('highest'):
        yield


def value_and_gradients(op, dtype, args, weights, *, ids, **fields):
    @compile_fast
    def run(args, weights):
        def loss(args):
            *arrays, bias_P = args
            o = op(*(x.astype(dtype) for x in arrays), segment_ids_BN=ids, bias_P=bias_P, **fields)
            return jnp.sum(o * weights), o

        return jax.value_and_grad(loss, has_aux=True)(args)

    (_, o), gradients = run(args, weights)
    return o, *gradients


# Several blocks of queries and keys, the last one not full; one block that is longer than the sequence.
@pytest.mark.parametrize(('causal', 'ids', 'n', 'bias', 'normalizer', 'dtype'), [
    (True, PACKED, 24, True, 'su', 'float32'),
    (False, PACKED, 24, True, 'paper', 'float32'),
    (True, None, 21, True, 'visible', 'bfloat16'),
    (False, None, 5, False, 'fixed', 'float32'),
    pytest.param(True, None, 37, False, 'fixed', 'float32', marks=pytest.mark.slow),
    pytest.param(False, PACKED, 24, True, 'visible', 'bfloat16', marks=pytest.mark.slow),
])  # fmt: skip
def test_values_and_all_gradients(constants, causal, ids, n, bias, normalizer, dtype):
    constants(tpu_quadratic.quadratic_attention, tpu_quadratic, BLOCKS=(8,))
    rng = np.random.default_rng(0)
    shapes = [(2, n, 6), (2, n, 6), (2, n, 10), (2 * n - 1,)]
    args, weights = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes], rng.standard_normal((2, n, 10))
    args[3] = args[3] if bias else None
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    fields = {'scoring': Scoring('relu2', normalizer, 8), 'causal': causal, 'ids': ids}
    if ids is not None:
        # What stands at padding must not be found anywhere.
        args[:3] = [jnp.where((ids == 0)[..., None], jnp.nan, x) for x in args[:3]]
    wanted = value_and_gradients(reference.quadratic_attention, 'float64', args, weights, impl='reference', **fields)
    with jax.enable_x64(False):
        narrow = jax.tree.map(lambda x: jnp.asarray(x, 'float32'), (args, weights))
        found = value_and_gradients(tpu_quadratic.quadratic_attention, dtype, *narrow, **fields)
    for name, a, b in zip(('o', 'q', 'k', 'v', 'bias'), found, wanted, strict=True):
        if b is not None:
            assert max_error(np.asarray(a, np.float64), b) < TOLERANCE[dtype], name
