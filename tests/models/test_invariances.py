"""What must not change the result of a model, and what must: causality, padding, packing, order in the batch.

One layer: what holds for each layer holds for a stack of them. Chunks and rows hold 5 of the 24 tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny import (
    CASES,
    CONTEXT,
    apply,
    compile_fast,
    expect_padding_to_reach_nothing,
    losses_and_gradients,
    make,
    positions_of,
    tokens,
)
from tests.numerics import LAYOUTS, max_error

TOLERANCE = 1e-11
# Near relatives of FLASH and Transformer++, Combiner, and second objectives run with the slow tests.
FAST = [
    ('flash_quad', 'lm'),
    ('flash', 'lm'),
    ('flash', 'mlm'),
    ('transformer_plus_plus', 'lm'),
    ('performer', 'lm'),
    ('linformer', 'mlm'),
]
MODELS = [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]

_made = functools.cache(functools.partial(make, num_layers=1))


def expect_same(x, y):
    assert max_error(x, y) < TOLERANCE


@pytest.mark.parametrize(('name', 'objective'), MODELS)
def test_padding_packing_prefix_and_order(name, objective):
    model, params = _made(name, objective)
    sequence = tokens(2)

    def run(weights, ids, sequence=sequence):
        return losses_and_gradients(model, params, sequence, weights, ids, positions_of(ids))

    # Two documents of 10 tokens, on edges of chunks, and padding: like each of them alone and unpacked.
    ids = jnp.asarray([[1] * 10 + [2] * 10 + [0] * 4] * 2)
    packed_losses, packed_gradient = run((ids > 0) * 1.0, ids)
    total = jax.tree.map(jnp.zeros_like, params)
    for document in (slice(0, 10), slice(10, 20)):
        losses, gradient = losses_and_gradients(model, params, sequence[:, document], jnp.ones((2, 10)))
        expect_same(packed_losses[:, document], losses)
        total = jax.tree.map(jnp.add, total, gradient)
    expect_same(packed_gradient, total)
    assert np.isfinite(packed_losses).all()

    # The first document alone is also the prefix of a longer text; the model sees it as such if it is causal.
    if objective == 'lm':
        weights = jnp.ones((2, CONTEXT)).at[:, 10:].set(0)
        first = losses_and_gradients(model, params, sequence[:, :10], jnp.ones((2, 10)))
        longer = run(weights, jnp.ones((2, CONTEXT), int))
        expect_same(longer[0][:, :10], first[0])
        expect_same(longer[1], first[1])

    # Boundaries inside chunks and holes: every document as if all others were padding, with other tokens in them.
    # (The places of chunks are fixed in the sequence, so the document keeps its place.)
    ids = jnp.asarray([LAYOUTS['packed'], LAYOUTS['holes']])
    packed_losses, packed_gradient = run((ids > 0) * 1.0, ids)
    total = jax.tree.map(jnp.zeros_like, params)
    for document in (1, 2, 3, 7):
        mine = ids == document
        alone = run(mine * 1.0, ids * mine, jnp.where(mine, sequence, tokens(2, seed=4)))
        expect_same(packed_losses[mine], alone[0][mine])
        total = jax.tree.map(jnp.add, total, alone[1])
    expect_same(packed_gradient, total)

    # The order in the batch.
    swapped_losses, swapped_gradient = run((ids > 0)[::-1] * 1.0, ids[::-1], sequence[::-1])
    expect_same(swapped_losses[::-1], packed_losses)
    expect_same(swapped_gradient, packed_gradient)


@pytest.mark.parametrize(('name', 'objective'), MODELS)
def test_who_reaches_whom(name, objective):
    model, params = _made(name, objective)
    sequence = jnp.arange(10)[None]

    # Token t has a row of the embedding to itself, so a gradient by that row is one by the token (`hidden` stops before
    # the head, which uses the same matrix).
    def hidden(embedding):
        return model.apply({'params': params | {'embedding': {'kernel': embedding}}}, sequence, method='hidden')[0]

    jacobian = compile_fast(jax.jacrev(hidden))(params['embedding']['kernel'])
    reach = np.abs(jacobian).sum((1, 3))[:, :10]
    assert (np.diag(reach) != 0).all()
    # relu^2 shuts many weights of a single layer; the second chunk sees the first all the same.
    assert (reach[np.tril_indices(10)] != 0).mean() > 0.2
    assert (reach[5:, :5] != 0).mean() > 0.2
    if objective == 'lm':
        assert (reach[np.triu_indices(10, 1)] == 0).all()
    else:
        assert (reach[:5, 5:] != 0).mean() > 0.2


@pytest.mark.parametrize(('name', 'objective'), MODELS)
def test_poisoned_padding_reaches_nothing(name, objective):
    model, params = _made(name, objective)
    ids = jnp.asarray([LAYOUTS['holes']])
    sequence = jnp.where(ids > 0, tokens(1) % 10, 10)

    def loss(params):
        hidden = model.apply({'params': params}, sequence, segment_ids_BN=ids, method='hidden')
        return (jnp.where(ids[..., None] > 0, hidden, 0) ** 2).sum(), hidden

    run = compile_fast(jax.value_and_grad(loss, has_aux=True))
    kernel = params['embedding']['kernel']
    # Token 10 stands at padding only.
    poisoned = params | {'embedding': {'kernel': kernel.at[10].set(jnp.nan)}}
    clean, dirty = run(params), run(poisoned)
    assert max_error(dirty, clean) == 0
    assert (clean[1]['embedding']['kernel'][10] == 0).all()


@pytest.mark.parametrize(('name', 'objective'), MODELS)
def test_numbers_at_padding_reach_nothing_in_any_layer(name, objective):
    expect_padding_to_reach_nothing(*_made(name, objective), jnp.asarray([LAYOUTS['holes'], LAYOUTS['left padding']]))


def test_the_papers_normalizer_lets_appended_text_change_the_past():
    # Why 'fixed' is the default of causal FLASH-Quad (trap 1).
    model, params = make('flash_quad', 'lm', normalizer='paper', num_layers=1)
    sequence = tokens(1)
    assert max_error(apply(model, params, sequence)[:, :9], apply(model, params, sequence[:, :9])) > 1e-3
