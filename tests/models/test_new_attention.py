"""An attention in one file and one registration (`toy_attention`) is a whole citizen, with no other file touched."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm, mlm
from gau.data import pipeline
from gau.errors import UserError
from gau.models import counts, decoding
from gau.models.architectures import ARCHITECTURES
from gau.models.config import resolve
from gau.training import config as training_config
from gau.training import mesh as meshes
from gau.training.batches import put_batch
from gau.training.setup import Run
from tests.models import tiny, toy_attention
from tests.numerics import LAYOUTS, max_error
from tests.programs import call

ROOT = Path(__file__).resolve().parents[2]
NAMES = ['toy', 'toy_transformer']


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    before = dict(ARCHITECTURES)
    toy_attention.register()
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


def python(*arguments, **environment):
    """Runs a program that registers the toy before it."""
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment, 'PYTHONPATH': '.'},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ('name', 'objective'), [('toy', 'lm'), pytest.param('toy_transformer', 'mlm', marks=pytest.mark.slow)]
)
def test_it_trains(name, objective):
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(False))
        config = {'lm': lm, 'mlm': mlm}[objective].get_config(f'model={name},runlocal')
        config.model.update({'num_layers': 1, 'model_dim': 32})
        config.data.context = 32
        config = training_config.resolve(config)
        run = Run.from_config(config)
        state, train_step = run.init_state(), run.train_step()
        batches = pipeline.train_iterator(config.data, objective=objective, tokenizer=run.tokenizer, seed=config.seed)
        losses = []
        with run.context():
            for _ in range(12):
                batch = put_batch(next(batches), meshes.batch_sharding(run.mesh))
                state, metrics = train_step(state, batch)
                losses.append(float(metrics['loss']))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize('name', NAMES)
def test_it_is_causal_and_documents_stay_apart(name):
    model, params = tiny.make(name, num_layers=1)
    ids = jnp.asarray([LAYOUTS['packed']])
    sequence, positions = tiny.tokens(), tiny.positions_of(ids)
    logits = tiny.apply(model, params, sequence, ids, positions)
    later = tiny.apply(model, params, sequence.at[0, 7:].set(0), ids, positions)
    assert max_error(later[:, :7], logits[:, :7]) == 0
    alone = tiny.apply(model, params, sequence[:, 5:16])
    assert max_error(logits[:, 5:16], alone) < 1e-12


@pytest.mark.parametrize('name', NAMES)
def test_it_is_counted(name):
    _, params = tiny.make(name)
    config = tiny.tiny_config(name)
    assert counts.parameters(config, vocab_size=tiny.VOCAB) == sum(leaf.size for leaf in jax.tree.leaves(params))
    options = {'vocab_size': tiny.VOCAB, 'causal': True}
    short, long = (counts.flops_per_token(config, context=n, **options) for n in (16, 64))
    assert long > short


def test_it_is_described():
    code, out, err = call('scripts/describe.py', '--config=configs/lm.py:model=toy,size=tiny', '--contexts=512')
    assert code == 0, err
    assert out.startswith('toy, lm')
    assert 'layer 0 to 3, each' in out


@pytest.mark.parametrize(('fields', 'message'), [
    ({'sharpness': -1.0}, 'model.sharpness must be positive, not -1.0'),
    ({'chunk_size': 4}, 'model.chunk_size=4 does not apply to toy: it is a field of'),
    ({'impl': 'triton'}, 'model.impl=triton does not exist for toy; choose from auto, reference'),
], ids=str)  # fmt: skip
def test_what_it_has_not_is_refused(fields, message):
    config = tiny.default_config()
    config.name = 'toy'
    config.update(fields)
    with pytest.raises(UserError, match=message):
        resolve(config, causal=True, context=8)


def test_its_shards_are_checked():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), ('data', 'fsdp', 'tensor', 'sequence'))
    options = {'batch_size': 2, 'model': tiny.tiny_config('toy')}
    meshes.check_batch(mesh, context=16, **options)
    with pytest.raises(UserError, match='is 6 tokens a device; a device must hold a multiple of 4 for toy'):
        meshes.check_batch(mesh, context=12, **options)


@pytest.mark.slow
def test_devices_share_it():
    """Loss and gradients on four simulated devices, of which two share rows and two the width, and on one."""
    found = json.loads(python('-m', 'tests.models.test_new_attention', JAX_PLATFORMS='cpu'))
    assert sorted(found) == NAMES
    assert max(found.values()) < 1e-12


def test_decoding_it_is_refused_in_one_line():
    model, _ = tiny.make('toy', num_layers=1)
    with pytest.raises(UserError, match=r'^toy cannot be decoded: its attention has no decoding state$'):
        decoding.init_state(model, batch_size=1, capacity=8)


def main() -> None:
    """Prints the largest relative difference between four devices and one, for each model."""
    toy_attention.register()
    report = {}
    for name in NAMES:
        # Widths that two devices can share.
        more = {'feed_forward_dim': 20} if name == 'toy_transformer' else {}
        model, params = tiny.make(name, num_layers=1, num_heads=2, **more)
        model = model.clone(vocab_size=12)
        params['embedding']['kernel'] = jnp.pad(params['embedding']['kernel'], ((0, 1), (0, 0)), constant_values=0.1)
        boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))['params']
        batch = tiny.tokens(2), jnp.ones((2, tiny.CONTEXT))

        def loss(params, sequence, weights, model=model):
            return model.apply({'params': params}, sequence, sequence, weights, method='weighted_loss')

        alone = tiny.compile_fast(jax.value_and_grad(loss))(params, *batch)
        types = (jax.sharding.AxisType.Auto,) * 4
        mesh = jax.make_mesh((2, 1, 2, 1), ('data', 'fsdp', 'tensor', 'sequence'), axis_types=types)
        placed = jax.device_put(params, meshes.shardings(boxed, mesh))
        with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.AXIS_RULES):
            step = tiny.compile_fast(jax.value_and_grad(lambda *args, loss=loss: loss(*args)))
            found = step(placed, *jax.device_put(batch, meshes.batch_sharding(mesh)))
        report[name] = max_error(found, alone)
    print(json.dumps(report))


if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    jax.config.update('jax_num_cpu_devices', 4)
    main()
