"""Compression: a narrower unit is exactly the smaller model, zeros are where they belong and stay, 8 bits are 8."""

import functools
import json

import flax.traverse_util
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gau import compression
from gau.errors import UserError
from gau.export.exporting import export
from gau.models.config import resolve
from gau.models.registry import build
from gau.training import evaluate, loop
from tests.models.tiny import CONTEXT, VOCAB, apply, make, tokens
from tests.numerics import float64, max_error
from tests.programs import call
from tests.training.test_commands import run
from tests.training.tiny import read_metrics, read_state, tiny_config


def flat(params):
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params).items()}


@pytest.fixture(autouse=True)
def _float64(request):
    # But for the runs, which have their own types.
    if 'trained' in request.fixturenames:
        yield
    else:
        with float64():
            yield


@pytest.mark.parametrize(
    ('name', 'fields'),
    [('flash', {'num_heads': 2}), ('flash_quad', {}), ('flash', {'layer_stack': 'scan', 'gate': 'none'})],
)
def test_a_narrower_unit_is_the_smaller_model(name, fields):
    model, params = make(name, **fields)
    leaves = flat(params)
    # Rows of Wo that are nothing: half of a head's columns have no part in the result.
    heads = fields.get('num_heads', 1)
    for path, x in leaves.items():
        if path[-2:] == ('out', 'kernel'):
            width = x.shape[-2] // heads
            silent = np.arange(x.shape[-2]) % width % 2 == 0
            leaves[path] = np.where(silent[:, None], 0, x)
    half = model.config.expansion_factor / 2
    found = compression.narrower(leaves, model.config, expansion_factor=half)
    assert found.report['kept_scores'] == pytest.approx(1)
    smaller = build(
        resolve(config_with(model.config, found.model), causal=True, context=CONTEXT), vocab_size=VOCAB, causal=True
    )
    expected = apply(model, flax.traverse_util.unflatten_dict(leaves), tokens(2))
    logits = apply(smaller, flax.traverse_util.unflatten_dict(found.params), tokens(2))
    assert max_error(logits, expected) < 1e-12


def config_with(config, fields):
    changed = ConfigDict(config.to_dict())
    for field, value in fields.items():
        changed[field] = value
    return changed


def test_the_columns_that_say_most_stay():
    scores = np.array([[3.0, 1, 2, 5], [1, 9, 8, 7]])
    np.testing.assert_array_equal(compression._largest(scores, 2), [0, 3, 5, 6])
    _, params = make('transformer_plus_plus')
    with pytest.raises(UserError, match='has no gated units'):
        compression.narrower(flat(params), make('transformer_plus_plus')[0].config, expansion_factor=1.0)
    model, params = make('flash', num_heads=2)
    for factor, message in ((2.0, 'below the'), (0.01, 'want a whole number'), (5 / 8, 'does not divide over the 2')):
        with pytest.raises(UserError, match=message):
            compression.narrower(flat(params), model.config, expansion_factor=factor)


@pytest.mark.parametrize('fields', [{}, {'layer_stack': 'scan'}])
def test_the_smallest_weights_of_every_layer_become_zero(fields):
    model, params = make('flash', **fields)
    leaves = flat(params)
    half = compression.sparser(leaves, model.config, pattern='0.5').params
    fours = compression.sparser(leaves, model.config, pattern='2:4').params
    kernels = 0
    for path, x in leaves.items():
        if path[-1] != 'kernel' or path[0] == 'embedding':
            assert half[path] is x
            continue
        stacked = path[0] == 'blocks'
        for old, new, four in zip(*((y if stacked else y[None]) for y in (x, half[path], fours[path])), strict=True):
            kernels += 1
            assert (new == 0).sum() == old.size // 2
            assert np.abs(old[new == 0]).max() <= np.abs(old[new != 0]).min()
            # Inputs are the first axis, in `out` all but the last: here one.
            groups = np.moveaxis(four, 0, -1).reshape(-1, 4)
            assert ((groups == 0).sum(axis=1) == 2).all()
            originals = np.abs(np.moveaxis(old, 0, -1).reshape(-1, 4))
            kept = np.where(groups != 0, originals, np.inf).min(axis=1)
            assert (np.where(groups == 0, originals, 0).max(axis=1) <= kept).all()
    assert kernels == 3 * model.config.num_layers
    for pattern in ('1:4', '0', '1.5'):
        with pytest.raises(UserError, match='want 2:4, or a share'):
            compression.sparser(leaves, model.config, pattern=pattern)


def test_rounded_kernels_are_integers_of_eight_bits_times_a_scale():
    pytest.importorskip('qwix', reason='requirements-compress.txt')
    model, params = make('flash')
    leaves = flat(params)
    found = compression.rounded(leaves, model.config)
    for path, x in leaves.items():
        if path[-1] != 'kernel':
            assert found.params[path] is x
            continue
        inputs = 1 if path[0] == 'embedding' else 0
        scale = np.abs(x).max(axis=inputs, keepdims=True) / 127.5
        integers = found.params[path] / scale
        assert np.abs(found.params[path] - x).max() <= 0.6 * scale.max()
        assert np.abs(integers - np.round(integers)).max() < 0.02 * 127
        assert len(np.unique(found.params[path])) <= 255 * scale.size
    assert 0.5 < found.report['bytes']['after'] / found.report['bytes']['in_16_bits'] < 0.8


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('compression') / 'trained'
    loop.train(tiny_config(), path)
    return path


@pytest.mark.slow
def test_a_sparse_model_recovers_with_its_zeros(trained, tmp_path):
    method = functools.partial(compression.sparser, pattern='0.5')
    compression.compress(trained, tmp_path / 'sparse', method)
    before = read_state(tmp_path / 'sparse')
    assert int(before.step) == 6
    config = tiny_config(init_from=str(tmp_path / 'sparse'), optimizer__keep_zeros=(r'blocks_.*kernel$',))
    loop.train(config, tmp_path / 'recovered')
    for (path, old), (_, new) in zip(
        *(
            jax.tree_util.tree_leaves_with_path(params)
            for params in (before.params, read_state(tmp_path / 'recovered').params)
        ),
        strict=True,
    ):
        if 'blocks' in str(path) and 'kernel' in str(path):
            assert ((np.asarray(old) == 0) == (np.asarray(new) == 0)).all()
            assert (np.asarray(old) != np.asarray(new)).sum() > old.size // 4
    with pytest.raises(UserError, match='keep_zeros: "nowhere" decides for no parameter'):
        loop.train(tiny_config(optimizer__keep_zeros=('nowhere',)), tmp_path / 'none')


@pytest.mark.slow
def test_a_narrower_model_is_a_run_like_any_other(trained, tmp_path):
    output = tmp_path / 'narrow'
    flags = [f'--workdir={trained}', f'--output={output}', '--method=narrower']
    code, out, err = run('scripts/compress.py', *flags, '--expansion_factor=1.5')
    assert (code, err) == (0, ''), err
    assert "expanded_dim {'before': 64, 'after': 48}" in out
    evaluate.evaluate(output)
    loss = json.loads((output / 'eval.jsonl').read_text())['loss']
    assert loss == pytest.approx(read_metrics(trained)[-1]['loss'], abs=0.1)
    assert (export(output, tmp_path / 'exported') / 'model.safetensors').is_file()
    loop.train(tiny_config(init_from=str(output), model__expansion_factor=1.5, steps=5), tmp_path / 'recovered')
    for words, message in (
        ([*flags, '--expansion_factor=1.5'], 'exists already: choose another directory'),
        ([*flags[:1], f'--output={tmp_path}/x', '--method=narrower'], '--method=narrower needs --expansion_factor'),
        ([*flags[:1], f'--output={tmp_path}/x', '--method=rounded', '--pattern=2:4'], 'does nothing with --pattern'),
        ([*flags[:1], f'--output={tmp_path}/x', '--method=smaller'], 'did you mean'),
        ([*flags[:1], f'--output={tmp_path}/x', '--method=narrower', '--expansion_factor=nan'], 'want a whole number'),
    ):
        code, out, err = call('scripts/compress.py', *words)
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert message in err
    assert not (tmp_path / 'x').exists()
