import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gau.errors import UserError
from gau.training import config as training_config
from gau.training import optimizer

PARAMS = {'blocks_0': {'gau': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}, 'embedding': jnp.ones((4, 2))}


def optimizer_config(**fields):
    config = training_config.default_config().optimizer
    config.update(fields)
    return config


@pytest.mark.parametrize('name', ['linear', 'cosine', 'constant'])
def test_schedule_warms_up_and_decays(name):
    config = optimizer_config(learning_rate=1.0, schedule=name, final_fraction=0.1)
    schedule = optimizer.make_schedule(config, warmup_steps=10, total_steps=110)
    rates = np.array([schedule(step) for step in range(111)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == pytest.approx(1.0)
    middle = {'linear': 0.55, 'cosine': 0.55, 'constant': 1.0}[name]
    assert rates[60] == pytest.approx(middle, rel=1e-5)
    assert rates[110] == pytest.approx(1.0 if name == 'constant' else 0.1, rel=1e-5)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match='longer than the run'):
        optimizer.make_schedule(optimizer_config(), warmup_steps=11, total_steps=10)


def test_no_warmup_starts_at_the_peak():
    schedule = optimizer.make_schedule(optimizer_config(learning_rate=0.5), warmup_steps=0, total_steps=10)
    assert float(schedule(0)) == 0.5


def test_weight_decay_follows_the_first_matching_rule():
    rules = ((r'embedding$', 0.5), (r'(kernel|embedding)$', 1.0))
    factors = optimizer.decay_factors(rules, PARAMS)
    assert factors == {'blocks_0': {'gau': {'kernel': 1.0, 'bias': 0.0}}, 'embedding': 0.5}


@pytest.mark.parametrize('rules', [((r'no_such', 1.0),), ((r'(', 1.0),), (('kernel',),)])
def test_bad_weight_decay_rules_are_refused(rules):
    with pytest.raises(UserError, match='weight_decay_rules'):
        optimizer.decay_factors(rules, PARAMS)


def test_matches_optax_adamw_where_both_can_say_the_same():
    config = optimizer_config(clip='global', clip_norm=0.3, weight_decay=0.1, weight_decay_rules=((r'.', 1.0),))
    ours = optimizer.make_optimizer(config, optax.constant_schedule(1e-2), PARAMS)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(1e-2, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1)
    )
    results = []
    for chosen in (ours, theirs):
        params, state = PARAMS, chosen.init(PARAMS)
        for step in range(3):
            grads = jax.tree.map(lambda x, s=step: jnp.sin(x * (s + 1.5)), params)
            updates, state = chosen.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *results)


def test_local_clipping_bounds_each_parameter_and_each_stacked_layer():
    clip = optimizer.clip_by_parameter_norm(1.0)
    grads = {
        'blocks': {'kernel': jnp.stack([jnp.full((2, 2), 5.0), jnp.full((2, 2), 0.1)])},
        'embedding': jnp.array([3.0, 4.0]),
        'bias': jnp.array([0.3]),
    }
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped['blocks']['kernel'][0], 0.5)
    np.testing.assert_allclose(clipped['blocks']['kernel'][1], 0.1)
    np.testing.assert_allclose(clipped['embedding'], [0.6, 0.8])
    np.testing.assert_allclose(clipped['bias'], [0.3])
