"""What must not change the result of a model, and what must: causality, padding, packing, order in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.tiny import CASES, CAUSAL, CONTEXT, apply, losses_and_gradients, make, positions_of, tokens
from tests.numerics import LAYOUTS, max_error

TOLERANCE = 1e-11


@pytest.fixture(scope='module')
def model_of():
    made = {}

    def get(name, objective):
        if (name, objective) not in made:
            made[name, objective] = make(name, objective)
        return made[name, objective]

    return get


@pytest.mark.parametrize('name', CAUSAL)
def test_no_gradient_from_the_future(name, model_of):
    model, params = model_of(name, 'lm')
    embedding = params['embedding']['kernel']
    # Token t has a row of the embedding to itself, so a gradient by that row is one by the token (`hidden` stops
    # before the head, which uses the same matrix).
    sequence = jnp.arange(10)[None]

    def hidden(embedding):
        return model.apply({'params': params | {'embedding': {'kernel': embedding}}}, sequence, method='hidden')[0]

    jacobian = np.abs(jax.jit(jax.jacrev(hidden))(embedding)).sum((1, 3))[:, :10]
    assert (jacobian[np.triu_indices(10, 1)] == 0).all()
    # relu^2 may shut single weights, but not most of them.
    assert (np.diag(jacobian) != 0).all()
    assert (jacobian[np.tril_indices(10)] != 0).mean() > 0.8
    assert (jacobian[5:, :5] != 0).mean() > 0.8


@pytest.mark.parametrize('name', sorted({name for name, objective in CASES if objective == 'mlm'}))
def test_bidirectional_models_see_everything(name, model_of):
    model, params = model_of(name, 'mlm')
    sequence = jnp.arange(10)[None]

    def hidden(embedding):
        return model.apply({'params': params | {'embedding': {'kernel': embedding}}}, sequence, method='hidden')[0]

    jacobian = np.abs(jax.jit(jax.jacrev(hidden))(params['embedding']['kernel'])).sum((1, 3))[:, :10]
    # Chunks and rows hold 5 tokens: the last reaches the first and the other way round.
    assert (jacobian != 0).mean() > 0.8
    assert (jacobian[:5, 5:] != 0).mean() > 0.8
    assert (jacobian[5:, :5] != 0).mean() > 0.8


@pytest.mark.parametrize('name', CAUSAL)
def test_appended_text_changes_nothing_before_it(name, model_of):
    model, params = model_of(name, 'lm')
    sequence = tokens(2)
    for n in (1, 9, 15):
        weights = jnp.ones((2, CONTEXT)).at[:, n:].set(0)
        whole = losses_and_gradients(model, params, sequence, weights)
        part = losses_and_gradients(model, params, sequence[:, :n], weights[:, :n])
        assert max_error(whole[0][:, :n], part[0]) < TOLERANCE
        assert max_error(whole[1], part[1]) < TOLERANCE
    logits = apply(model, params, sequence)
    changed = apply(model, params, sequence.at[:, 15:].set(0))
    np.testing.assert_allclose(changed[:, :15], logits[:, :15], rtol=0, atol=1e-9 * np.abs(logits).max())


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_right_padding_changes_nothing(name, objective, model_of):
    model, params = model_of(name, objective)
    sequence = tokens(2)
    for n in (1, 13):
        weights = jnp.ones((2, CONTEXT)).at[:, n:].set(0)
        ids = weights.astype(int)
        padded = losses_and_gradients(model, params, sequence, weights, ids)
        alone = losses_and_gradients(model, params, sequence[:, :n], weights[:, :n])
        assert max_error(padded[0][:, :n], alone[0]) < TOLERANCE
        assert max_error(padded[1], alone[1]) < TOLERANCE
        assert np.isfinite(padded[0]).all()


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_packed_documents_are_strangers(name, objective, model_of):
    # Chunks have fixed places in the sequence, so a document is compared with itself at the same place and all others
    # replaced by padding; boundaries at 5 and 16 lie on a chunk's edge and inside a chunk.
    model, params = model_of(name, objective)
    sequence = tokens(1)
    for layout in ('packed', 'holes'):
        ids = jnp.asarray([LAYOUTS[layout]])
        positions = positions_of(ids)
        documents = [document for document in np.unique(ids) if document]
        packed = losses_and_gradients(model, params, sequence, (ids > 0) * 1.0, ids, positions)
        total = jax.tree.map(jnp.zeros_like, packed[1])
        for document in documents:
            mine = ids == document
            # Other tokens stand where the others were.
            others = jnp.where(mine, sequence, tokens(1, seed=4))
            alone = losses_and_gradients(model, params, others, mine * 1.0, ids * mine, positions)
            assert max_error(packed[0][mine], alone[0][mine]) < TOLERANCE
            total = jax.tree.map(jnp.add, total, alone[1])
        assert max_error(packed[1], total) < TOLERANCE


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_packed_equals_separate_where_chunks_fall_alike(name, objective, model_of):
    model, params = model_of(name, objective)
    sequence = tokens(1)
    ids = jnp.asarray([[1] * 10 + [2] * 14])
    packed = apply(model, params, sequence, ids, positions_of(ids))
    for part in (slice(0, 10), slice(10, 24)):
        np.testing.assert_allclose(packed[:, part], apply(model, params, sequence[:, part]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_order_in_the_batch_does_not_matter(name, objective, model_of):
    model, params = model_of(name, objective)
    sequence = tokens(3)
    ids = jnp.asarray([LAYOUTS[layout] for layout in ('packed', 'holes', 'left padding')])
    order = jnp.asarray([2, 0, 1])
    logits = apply(model, params, sequence, ids)
    permuted = apply(model, params, sequence[order], ids[order])
    np.testing.assert_allclose(permuted, logits[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_poisoned_padding_reaches_nothing(name, objective, model_of):
    model, params = model_of(name, objective)
    ids = jnp.asarray([LAYOUTS['holes']])
    sequence = jnp.where(ids > 0, tokens(1) % 10, 10)
    weights = (ids > 0) * 1.0

    def loss(embedding):
        # The embedding of token 10 alone is poisoned, on its way in only.
        hidden = model.apply(
            {'params': params | {'embedding': {'kernel': embedding}}}, sequence, segment_ids_BN=ids, method='hidden'
        )
        return (jnp.where(weights[..., None] > 0, hidden, 0) ** 2).sum(), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    kernel = params['embedding']['kernel']
    clean, dirty = run(kernel), run(kernel.at[10].set(jnp.nan))
    assert max_error(dirty, clean) == 0
    assert (clean[1][10] == 0).all()


def test_the_papers_normalizer_lets_appended_text_change_the_past():
    # Why 'fixed' is the default of causal FLASH-Quad (trap 1): the opposite of the test above.
    model, params = make('flash_quad', 'lm', normalizer='paper')
    sequence = tokens(1)
    assert max_error(apply(model, params, sequence)[:, :9], apply(model, params, sequence[:, :9])) > 1e-3
