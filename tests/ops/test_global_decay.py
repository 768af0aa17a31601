"""The decay of the global branch: every chunk in between takes its share of an earlier token's weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import chunk_states
from gau.ops.mixed_chunk_attention import ChunkSpec, mixed_chunk_attention
from gau.ops.scores import Scoring
from tests.numerics import LAYOUTS, max_error

N, S, E, C, DECAY = 24, 3, 4, 3, 0.6


def inputs(batch):
    generator = np.random.default_rng(0)
    return [generator.standard_normal((batch, N, width)) for width in (S, S, S, S, E)]


def by_hand(q_lin, k_lin, v, ids, reduction):
    """The global branch alone, token by token: [N, E]."""
    o = np.zeros((N, E))
    for i in range(N):
        seen = [j for j in range(N) if j // C < i // C and ids[i] == ids[j] > 0]
        weights = [DECAY ** (i // C - j // C - 1) for j in seen]
        for j, weight in zip(seen, weights, strict=True):
            o[i] += weight * (q_lin[i] @ k_lin[j]) * v[j] / (sum(weights) if reduction == 'mean' else 1)
    return o


@functools.partial(jax.jit, static_argnames=('reduction', 'impl', 'branches'))
def apply(arrays, ids, *, reduction, impl, branches):
    spec = ChunkSpec(C, Scoring('relu2', 'fixed', 8), True, branches, reduction, DECAY)
    return mixed_chunk_attention(*arrays, spec=spec, segment_ids_BN=ids, impl=impl)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_values_are_the_formula(impl, reduction):
    ids = np.stack(list(LAYOUTS.values()) if impl == 'reference' else [LAYOUTS['packed'], np.ones(N, int)])
    x = inputs(len(ids))
    y = apply(x, ids, reduction=reduction, impl=impl, branches='global')
    expected = [by_hand(*(a[row] for a in x[2:]), ids[row], reduction) for row in range(len(ids))]
    np.testing.assert_allclose(y, np.stack(expected) * (ids > 0)[..., None], atol=1e-12)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('group', [256, 3])
def test_chunked_form_equals_the_reference_with_every_gradient(constants, group, reduction):
    constants(mixed_chunk_attention, chunk_states, GROUP=group)
    ids = np.stack([layout for name, layout in LAYOUTS.items() if name != 'short'])
    x, c = inputs(len(ids)), np.random.default_rng(1).standard_normal((N, E))

    def values_and_gradients(impl):
        def loss(x):
            y = apply(x, ids, reduction=reduction, impl=impl, branches='both')
            return (y * c).sum(), y

        return jax.value_and_grad(loss, has_aux=True)([jnp.asarray(a) for a in x])

    assert max_error(values_and_gradients('xla'), values_and_gradients('reference')) < 1e-12
