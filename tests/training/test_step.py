"""The step's loss and gradient: the same for any number of micro-batches, with weights as MLM has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.training.config import resolve
from gau.training.setup import Run
from tests.training.tiny import tiny_config


def metrics_and_params(accumulation_steps, batch, **fields):
    config = resolve(
        tiny_config(data__batch_size=4, optimizer__accumulation_steps=accumulation_steps, model__num_layers=1, **fields)
    )
    run = Run.from_config(config)
    state, train_step = run.init_state(), run.train_step()
    with run.context():
        state, metrics = train_step(state, batch)
    return jax.device_get(metrics), jax.device_get(state.params)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (4, 48)).astype(np.int32)
    # As masked batches come: unequal numbers of targets in the rows, none at all in one.
    weights = (rng.random((4, 48)) < np.array([[0.5], [0.1], [0.0], [0.3]])).astype(np.float32)
    return {'inputs': jnp.array(tokens), 'targets': jnp.array(tokens), 'weights': jnp.array(weights)}


@pytest.mark.parametrize(
    ('objective', 'accumulation_steps'), [pytest.param('lm', 2, marks=pytest.mark.slow), ('mlm', 4)]
)
def test_micro_batches_add_up_to_the_batch(batch, objective, accumulation_steps):
    whole, params = metrics_and_params(1, batch, objective=objective)
    assert whole['tokens'] == batch['weights'].sum()
    parts, params_of_parts = metrics_and_params(accumulation_steps, batch, objective=objective)
    assert parts['loss'] == pytest.approx(whole['loss'], rel=1e-6)
    assert parts['grad_norm'] == pytest.approx(whole['grad_norm'], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params_of_parts, params)


def test_a_batch_without_targets_moves_nothing_but_by_decay(batch):
    batch['weights'] = jnp.zeros_like(batch['weights'])
    metrics, _ = metrics_and_params(1, batch, objective='mlm')
    assert metrics['loss'] == 0
    assert metrics['grad_norm'] == 0


def test_dropout_is_drawn_anew_each_step_and_the_same_again(batch):
    config = resolve(tiny_config(data__batch_size=4, model__num_layers=1, model__dropout_rate=0.5))
    run = Run.from_config(config)
    train_step = run.train_step()

    def losses():
        state, found = run.init_state(), []
        with run.context():
            for _ in range(2):
                state, metrics = train_step(state.replace(params=run.init_state().params), batch)
                found.append(float(metrics['loss']))
        return found

    first, second = losses()
    assert first != second
    assert losses() == [first, second]
