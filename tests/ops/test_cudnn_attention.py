"""cuDNN's attention against the reference. Without a GPU the same code runs on XLA's attention in place of cuDNN's.

On a GPU: GAU_TEST_PLATFORM=cuda python -m pytest tests/ops/test_cudnn_attention.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.models.registry import build
from gau.models.target import Target
from gau.ops.kernels.cudnn_attention import cudnn_attention, document_columns
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring
from tests.models.tiny import compile_fast, tiny_config
from tests.numerics import LAYOUTS, max_error, random_like

on_gpu = pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs an NVIDIA GPU')
# Largest error over the largest number. bfloat16: a rounding of scores, of weights and of the result each.
BACKENDS = [
    pytest.param('xla', 'float32', 5e-6),
    pytest.param('xla', 'bfloat16', 2e-2),
    pytest.param('cudnn', 'bfloat16', 2e-2, marks=on_gpu),
]
H = 3


@pytest.fixture(autouse=True)
def _full_precision():
    # A GPU would else round float32 to TF32 in matrix products.
    with jax.default_matmul_precision('highest'):
        yield


def inputs(batch, n, width, dtype):
    """q, k, v and the gradient of the result, as `dtype` can hold them, in float64."""
    generator = np.random.default_rng(n)
    return [jnp.asarray(generator.standard_normal((batch, n, H, width)), dtype).astype('float64') for _ in range(4)]


@functools.partial(compile_fast, static_argnames=('causal', 'implementation'))
def run(q, k, v, g, ids, *, causal, implementation):
    """Result and gradients of q, k and v, in the type of the inputs; of the reference for implementation=None."""

    def attend(q, k, v):
        if implementation is not None:
            return cudnn_attention(q, k, v, causal=causal, segment_ids_BN=ids, implementation=implementation)
        one_head = functools.partial(
            quadratic_attention,
            scoring=Scoring('softmax', None),
            causal=causal,
            segment_ids_BN=ids,
            impl='reference',
        )
        return jax.vmap(one_head, 2, 2)(q, k, v)

    y, backward = jax.vjp(attend, q, k, v)
    return y, *backward(g)


@pytest.mark.parametrize(('implementation', 'dtype', 'bound'), BACKENDS)
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('width', 'ids'), [
    (16, list(LAYOUTS.values())),
    (64, [np.arange(131) // 4 + 1, np.arange(131) * 7919 % 2**31 // 16]),
    pytest.param(24, None, id='one'),
])  # fmt: skip
def test_values_and_gradients(implementation, dtype, bound, causal, width, ids):
    ids = None if ids is None else jnp.asarray(np.stack(ids))
    x = inputs(*((2, 37) if ids is None else ids.shape), width, dtype)
    expected = run(*x, ids, causal=causal, implementation=None)
    found = run(*(a.astype(dtype) for a in x), ids, causal=causal, implementation=implementation)
    assert all(a.dtype == dtype for a in found)
    # The columns that tell documents apart cost an error of up to 5e-4 in a score.
    bound = bound if ids is None else max(bound, 1e-3)
    for a, b in zip(found, expected, strict=True):
        assert max_error(a.astype('float64'), b) < bound


@pytest.mark.parametrize(('implementation', 'dtype', 'bound'), BACKENDS)
@pytest.mark.parametrize('causal', [True, False])
def test_other_documents_and_poisoned_padding_reach_nothing(implementation, dtype, bound, causal):
    """Not even bits of a document change with what stands beside it, at scores of hundreds."""
    ids = jnp.asarray([[1] * 7 + [2] * 12 + [0] * 5, [3] * 16 + [9] * 8])
    x = [8 * a.astype(dtype) for a in inputs(2, 24, 16, dtype)]
    first = jnp.asarray([[1] * 7 + [0] * 17, [1] * 16 + [0] * 8])[..., None, None] == 1

    clean = run(*x, ids, causal=causal, implementation=implementation)
    other = [jnp.where(first, a, jnp.where(ids[..., None, None] == 0, jnp.nan, -a)) for a in x]
    changed = run(*other, ids, causal=causal, implementation=implementation)
    for a, b in zip(changed, clean, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(np.where(first, a, 0), np.where(first, b, 0))
        assert (a[np.asarray(ids) == 0] == 0).all()


@pytest.mark.parametrize('n', [1, 2, 128, 129])
def test_columns_tell_documents_apart(n):
    ids = np.random.default_rng(n).integers(0, n, (2, n)) * 1000
    q, k = document_columns(jnp.asarray(ids))
    assert q.shape[-1] % 8 == 0
    products = np.asarray(jnp.einsum('BNX,BMX->BNM', q, k))
    same = ids[:, :, None] == ids[:, None]
    assert (products[same] == 0).all()
    assert (products[~same] <= -2).all()
    assert np.abs(np.asarray(k)).max() <= 256, 'whole numbers that bfloat16 can hold'


@on_gpu
def test_a_model_on_a_gpu_takes_it_and_has_the_same_gradients():
    fields = {'dtype': 'bfloat16', 'model_dim': 64, 'num_heads': 2, 'temperature': 'learned'}
    config = tiny_config('transformer_plus_plus', **fields)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 24)))
    ids = jnp.asarray([LAYOUTS['packed'], LAYOUTS['holes']])
    weights = (ids > 0).astype('float32')
    fused = build(config, vocab_size=11, causal=True)
    assert fused.implementation.attention == 'cudnn'
    plain = build(config, vocab_size=11, causal=True, target=Target('cpu'))
    assert plain.implementation.attention == 'xla'
    params = random_like(jax.eval_shape(plain.init, jax.random.key(0), tokens)['params'], 0, scale=0.1)

    def gradient(model):
        return jax.jit(
            jax.grad(
                lambda params: model.apply(
                    {'params': params}, tokens, tokens, weights, segment_ids_BN=ids, method='weighted_loss'
                )
            )
        )(params)

    assert max_error(gradient(fused), gradient(plain)) < 3e-2
