"""JAX's softmax attention for TPUs against the reference, interpreted on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.kernels.splash_attention import splash_attention
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring
from tests.models.tiny import compile_fast
from tests.numerics import LAYOUTS, max_error
from tests.programs import report

H = 2


@functools.partial(compile_fast, static_argnames=('causal', 'splash'))
def run(q, k, v, g, ids, *, causal, splash):
    """Result and gradients of q, k and v, in the type of the inputs."""

    def attend(q, k, v):
        if splash:
            return splash_attention(q, k, v, causal=causal, segment_ids_BN=ids, interpret=True)
        one_head = functools.partial(
            quadratic_attention,
            scoring=Scoring('softmax', None),
            causal=causal,
            segment_ids_BN=ids,
            impl='reference',
        )
        return jax.vmap(one_head, 1, 1)(q, k, v)

    y, backward = jax.vjp(attend, q, k, v)
    return y, *backward(g)


def documents(n):
    """Ids of documents of many lengths, with padding in between and at the end."""
    return np.stack([np.r_[np.ones(n - 50), np.zeros(7), np.full(43, 2)], np.arange(n) // 70 % 4]).astype('int32')


# A length of three blocks of 128 tokens, one that fills its block, and short ones.
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('width', 'ids', 'dtype', 'bound'), [
    (64, np.stack(list(LAYOUTS.values())), 'float32', 1e-5),
    (96, documents(300), 'float32', 1e-5),
    pytest.param(256, 128, 'float32', 1e-5, marks=pytest.mark.slow),
    (64, 37, 'float32', 1e-5),
    (128, documents(300), 'bfloat16', 2e-2),
], ids=['layouts', 'documents', '128', '37', 'bfloat16'])  # fmt: skip
def test_values_and_gradients(width, ids, dtype, bound, causal):
    shape, ids = ((2, ids), None) if isinstance(ids, int) else (ids.shape, jnp.asarray(ids))
    rng = np.random.default_rng(width)
    x = [jnp.asarray(rng.standard_normal((shape[0], H, shape[1], width)), dtype) for _ in range(4)]
    expected = run(*(a.astype('float64') for a in x), ids, causal=causal, splash=False)
    with jax.enable_x64(False):
        found = run(*x, ids, causal=causal, splash=True)
    assert all(a.dtype == dtype for a in found)
    for a, b in zip(found, expected, strict=True):
        assert max_error(np.asarray(a, 'float64'), b) < bound


def test_other_documents_and_poisoned_padding_reach_nothing():
    ids = jnp.asarray([[1] * 7 + [2] * 12 + [0] * 5, [3] * 16 + [9] * 8], 'int32')
    rng = np.random.default_rng(0)
    x = [8 * jnp.asarray(rng.standard_normal((2, 1, 24, 64)), 'float32') for _ in range(4)]
    first = jnp.asarray([[1] * 7 + [0] * 17, [1] * 16 + [0] * 8])[:, None, :, None] == 1
    padding = ids[:, None, :, None] == 0
    with jax.enable_x64(False):
        clean = run(*x, ids, causal=True, splash=True)
        other = [jnp.where(first, a, jnp.where(padding, jnp.nan, -a)) for a in x]
        changed = run(*other, ids, causal=True, splash=True)
    for a, b in zip(changed, clean, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(np.where(first, a, 0), np.where(first, b, 0))
        assert (np.where(padding, a, 0) == 0).all()


@pytest.mark.slow
def test_queries_over_devices_give_the_same():
    found = report('tests.ops.sharded_splash')
    assert len(found) == 4
    for case, difference in found.items():
        assert difference < 1e-5, case
