import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from gau.errors import UserError
from gau.training import config as training_config
from gau.training import optimizer, workdir
from tests.training.processes import TINY, mesh, start

PARAMS = {'blocks_0': {'gau': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}, 'embedding': jnp.ones((4, 2))}


def optimizer_config(**fields):
    config = training_config.default_config()
    config.optimizer.update(fields)
    return training_config.resolve(config).optimizer


@pytest.mark.parametrize('name', ['linear', 'cosine', 'constant'])
def test_schedule_warms_up_and_decays(name):
    fraction = None if name == 'constant' else 0.1
    config = optimizer_config(learning_rate=1.0, schedule=name, final_fraction=fraction)
    schedule = optimizer.make_schedule(config, warmup_steps=10, total_steps=110)
    rates = np.array([schedule(step) for step in range(111)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == pytest.approx(1.0)
    middle = {'linear': 0.55, 'cosine': 0.55, 'constant': 1.0}[name]
    assert rates[60] == pytest.approx(middle, rel=1e-5)
    assert rates[110] == pytest.approx(1.0 if name == 'constant' else 0.1, rel=1e-5)


def test_warmup_stable_decay():
    config = optimizer_config(learning_rate=1.0, schedule='wsd', final_fraction=0.1, decay_steps=50)
    schedule = optimizer.make_schedule(config, warmup_steps=10, total_steps=110, last_decay_steps=50)
    rates = np.array([schedule(step) for step in range(111)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:61], 1.0)
    np.testing.assert_allclose(rates[[85, 110]], [0.55, 0.1], rtol=1e-5)
    assert optimizer_config(schedule='wsd').decay_percent == 20
    for fields, message in (
        ({'decay_steps': 5}, 'optimizer.decay_steps is for optimizer.schedule=wsd'),
        ({'schedule': 'wsd', 'decay_steps': 5, 'decay_percent': 1.0}, 'exactly one of optimizer.decay_steps'),
        ({'b1': 1.0}, r'optimizer.b1=1.0 must lie in 0..1, below 1'),
        ({'b2': 1.0}, r'optimizer.b2=1.0 must lie in 0..1, below 1'),
    ):
        with pytest.raises(UserError, match=message):
            optimizer_config(**fields)
    with pytest.raises(UserError, match='warm-up of 60 steps and the decay of 50 are longer than the run of 100'):
        optimizer.make_schedule(config, warmup_steps=60, total_steps=100, last_decay_steps=50)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r'run of 10: optimizer\.warmup_steps is to be 10 at most'):
        optimizer.make_schedule(optimizer_config(), warmup_steps=11, total_steps=10)


def test_no_warmup_starts_at_the_peak():
    schedule = optimizer.make_schedule(optimizer_config(learning_rate=0.5), warmup_steps=0, total_steps=10)
    assert float(schedule(0)) == 0.5


def test_weight_decay_follows_the_first_matching_rule():
    rules = ((r'embedding$', 0.5), (r'(kernel|embedding)$', 1.0))
    factors = optimizer.rule_factors('weight_decay_rules', rules, PARAMS, otherwise=0.0)
    assert factors == {'blocks_0': {'gau': {'kernel': 1.0, 'bias': 0.0}}, 'embedding': 0.5}


@pytest.mark.parametrize('rules', [((r'no_such', 1.0),), ((r'(', 1.0),), (('kernel',),)])
def test_bad_weight_decay_rules_are_refused(rules):
    with pytest.raises(UserError, match='weight_decay_rules'):
        optimizer.rule_factors('weight_decay_rules', rules, PARAMS, otherwise=0.0)


def test_matches_optax_adamw_where_both_can_say_the_same():
    config = optimizer_config(clip='global', clip_norm=0.3, weight_decay=0.1, weight_decay_rules=((r'.', 1.0),))
    ours = optimizer.make_optimizer(config, optax.constant_schedule(1e-2), PARAMS)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(1e-2, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1)
    )
    assert_same_steps(ours, theirs)


def assert_same_steps(ours, theirs, params=PARAMS, rtol=1e-6):
    results = [steps(chosen, params) for chosen in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), *results)


def steps(chosen, params, number=3):
    state = chosen.init(params)
    update = jax.jit(chosen.update)
    for step in range(number):
        grads = jax.tree.map(lambda x, s=step: jnp.sin(x * (s + 1.5)), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def plain(name, params, dtype='float32'):
    """The optimizer by itself, without clipping and decay."""
    config = optimizer_config(name=name, clip='none', weight_decay=0.0, weight_decay_rules=())
    return optimizer.make_optimizer(config, optax.constant_schedule(1e-2), params, dtype=dtype)


OTHERS = {
    'lion': lambda: optax.lion(1e-2, b1=0.9, b2=0.99, weight_decay=0.0),
    'adafactor': lambda: optax.adafactor(1e-2),
    'muon': lambda: optax.contrib.muon(
        1e-2,
        adam_b1=0.9,
        adam_b2=0.999,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, leaf: optax.contrib.MuonDimensionNumbers() if 'gau' in str(path) and leaf.ndim == 2 else None,
            params,
        ),
    ),
}


@pytest.mark.parametrize('name', OTHERS)
def test_others_are_those_of_optax(name):
    params = {
        'blocks_0': {'gau': {'kernel': draw((256, 192)), 'bias': draw((192,), 1)}},
        'embedding': {'kernel': draw((300, 256), 2)},
    }
    ours = plain(name, params)
    if name == 'muon':
        # There the rest is moved with Nesterov's momentum, and another eps.
        own, theirs = (steps(chosen, params)['blocks_0']['gau']['kernel'] for chosen in (ours, OTHERS[name]()))
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-6)
        rest = {'blocks_0': {'gau': {'bias': params['blocks_0']['gau']['bias']}}, 'embedding': params['embedding']}
        adamw = optax.adamw(1e-2, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0)
        own, theirs = steps(ours, params), steps(adamw, rest)
        np.testing.assert_allclose(own['embedding']['kernel'], theirs['embedding']['kernel'], rtol=1e-5)
        np.testing.assert_allclose(own['blocks_0']['gau']['bias'], theirs['blocks_0']['gau']['bias'], rtol=1e-5)
    else:
        assert_same_steps(ours, OTHERS[name](), params)


def test_muon_takes_every_part_head_and_stacked_layer_for_what_it_is():
    kernels = {
        'uv': draw((2, 32, 2, 64)),  # layers, D, U and V, E
        'qkv': draw((2, 32, 3, 4, 8), 1),  # layers, D, three parts, H, K
        'out': draw((2, 4, 8, 32), 2),  # layers, H, K, D
    }
    # As in a model with a head of its own around the language model.
    stacked = {'trunk': {'blocks': {name: {'kernel': kernel} for name, kernel in kernels.items()}}}
    matrices = {}
    for layer in range(2):
        for part in range(2):
            matrices[f'uv_{layer}_{part}'] = kernels['uv'][layer, :, part]
        for part in range(3):
            matrices[f'qkv_{layer}_{part}'] = kernels['qkv'][layer, :, part].reshape(32, 32)
        matrices[f'out_{layer}'] = kernels['out'][layer].reshape(32, 32)
    apart = {'blocks_0': {name: {'kernel': kernel} for name, kernel in matrices.items()}}
    together = steps(plain('muon', stacked), stacked)['trunk']
    alone = steps(plain('muon', apart), apart)['blocks_0']
    for layer in range(2):
        for name, parts in (('uv', 2), ('qkv', 3)):
            for part in range(parts):
                found = together['blocks'][name]['kernel'][layer, :, part].reshape(32, -1)
                np.testing.assert_allclose(found, alone[f'{name}_{layer}_{part}']['kernel'], rtol=2e-4, atol=1e-5)
        found = together['blocks']['out']['kernel'][layer].reshape(32, 32)
        np.testing.assert_allclose(found, alone[f'out_{layer}']['kernel'], rtol=2e-4, atol=1e-5)


def test_muon_takes_kernels_of_one_shape_at_once():
    kernels = {f'blocks_{layer}': {'out': {'kernel': draw((48, 32), layer)}} for layer in range(5)}
    chosen = plain('muon', kernels, 'bfloat16')
    text = jax.jit(chosen.update).lower(kernels, chosen.init(kernels), kernels).as_text()
    # Five iterations of three matmuls, and nothing multiplies beside them. JAX 0.10 writes one iteration and calls it.
    matmuls = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
    assert len(matmuls) == (3 if jax.__version_info__ < (0, 11) else 5 * 3)
    assert all('(tensor<5x32x' in line and 'bf16' in line for line in matmuls), matmuls
    exact, rounded = (steps(plain('muon', kernels, dtype), kernels, number=1) for dtype in ('float32', 'bfloat16'))
    for name, kernel in kernels.items():
        a, b = (np.asarray(run[name]['out']['kernel'] - kernel['out']['kernel']) for run in (exact, rounded))
        assert b.dtype == np.float32
        # Rounding moves the smallest singular values most, which five iterations leave between 0.7 and 1.2 in any case.
        assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.1


def test_muon_steps_are_as_large_as_adamws():
    params = {'blocks_0': {'gau': {'kernel': draw((128, 256))}}}
    moved = steps(plain('muon', params), params, number=1)
    step = np.asarray(moved['blocks_0']['gau']['kernel'] - params['blocks_0']['gau']['kernel'])
    assert np.sqrt(np.mean(step**2)) == pytest.approx(0.2 * 1e-2, rel=0.2)


def test_learning_rate_rules_scale_whole_steps():
    schedule = optax.constant_schedule(1e-2)
    rules = (('embedding', 0.1), (r'bias$', 0.0))
    usual = optimizer.make_optimizer(optimizer_config(weight_decay=0.5), schedule, PARAMS)
    ruled = optimizer.make_optimizer(optimizer_config(weight_decay=0.5, learning_rate_rules=rules), schedule, PARAMS)
    before, after = (steps(chosen, PARAMS, number=1) for chosen in (usual, ruled))
    moved = jax.tree.map(lambda new, old: new - old, before, PARAMS)
    np.testing.assert_allclose(after['embedding'], PARAMS['embedding'] + 0.1 * moved['embedding'], rtol=1e-6)
    np.testing.assert_array_equal(after['blocks_0']['gau']['bias'], PARAMS['blocks_0']['gau']['bias'])
    np.testing.assert_array_equal(after['blocks_0']['gau']['kernel'], before['blocks_0']['gau']['kernel'])
    config = optimizer_config(learning_rate_rules=(('no_such', 2.0),))
    with pytest.raises(UserError, match=r'learning_rate_rules: "no_such" decides for no parameter'):
        optimizer.make_optimizer(config, schedule, PARAMS)
    for factor in (-1.0, float('nan')):
        config = optimizer_config(learning_rate_rules=(('embedding', factor),))
        with pytest.raises(UserError, match=r'learning_rate_rules: the factor .* of "embedding" is none from 0 on'):
            optimizer.make_optimizer(config, schedule, PARAMS)


IDLE = {
    'clip_norm': (
        {'clip': 'none', 'clip_norm': 0.1},
        r'optimizer\.clip_norm=0\.1 does nothing with optimizer\.clip=none',
    ),
    'final_fraction': ({'schedule': 'constant', 'final_fraction': 0.5}, 'schedule=constant'),
    'eps': ({'name': 'lion', 'eps': 1e-8}, 'name=lion'),
    'b2': ({'name': 'adafactor', 'b2': 0.9}, 'name=adafactor'),
    'name': ({'name': 'adam'}, 'did you mean "adamw"'),
}


@pytest.mark.parametrize('case', IDLE)
def test_options_that_do_nothing_are_refused(case):
    fields, hint = IDLE[case]
    with pytest.raises(UserError, match=hint):
        optimizer_config(**fields)


def test_work_directories_from_before_that_still_open(tmp_path):
    config = training_config.default_config()
    config.optimizer.update({'schedule': 'constant', 'clip': 'none'})
    new = training_config.resolve(config)
    # What was written before there were other optimizers.
    old = workdir.config_to_dict(new)
    for field in ('name', 'learning_rate_rules'):
        del old['optimizer'][field]
    old['optimizer'].update({'clip_norm': 0.1, 'final_fraction': 0.0})
    workdir.write_json(tmp_path / 'config.json', old)
    stored = workdir.read_config(tmp_path)
    assert training_config.differences(workdir.config_to_dict(stored), workdir.config_to_dict(new)) == []


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adafactor', 'lion', 'muon'])
def test_others_train_alike_on_a_mesh(name, tmp_path):
    rows = {}
    for devices, sizes in ((1, mesh()), (4, mesh(fsdp=2, tensor=2))):
        path = tmp_path / str(devices)
        config = ['--config=configs/lm.py:runlocal,size=tiny', *TINY[1:], f'--config.optimizer.name={name}']
        process = start('train.py', *config, *sizes, '--config.steps=6', f'--workdir={path}', devices=devices)
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
        rows[devices] = [row['loss'] for row in workdir.read_metrics(path / 'metrics.jsonl')]
    np.testing.assert_allclose(rows[4], rows[1], rtol=1e-4)


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
