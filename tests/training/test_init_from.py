"""`init_from`: a run that starts from exported weights."""

import functools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.export.exporting import export
from gau.training import loop
from gau.training.init_from import with_pretrained
from gau.training.setup import Run
from tests.programs import call
from tests.training import tiny
from tests.training.tiny import assert_trees_equal, read_state

tiny_config = functools.partial(tiny.tiny_config, model__num_layers=1)


@pytest.fixture(scope='module')
def trained(tiny_run):
    return tiny_run


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    return export(trained, tmp_path_factory.mktemp('init_from') / 'exported')


@pytest.mark.slow
def test_a_run_starts_with_the_parameters_and_resumes_without_the_export(trained, exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / 'copy')
    config = tiny_config(init_from=str(copy), checkpoint__keep_last=9)
    loop.train(config, tmp_path / 'run')
    assert_trees_equal(read_state(tmp_path / 'run', step=0).params, read_state(trained).params)
    assert not np.array_equal(
        read_state(tmp_path / 'run').params['embedding']['kernel'], read_state(trained).params['embedding']['kernel']
    )
    assert json.loads((tmp_path / 'run/config.json').read_text())['init_from'] == str(copy)
    for step in (2, 4, 6):
        shutil.rmtree(tmp_path / f'run/checkpoints/{step}', ignore_errors=True)
    shutil.rmtree(copy)
    final = loop.train(tiny_config(checkpoint__keep_last=9), tmp_path / 'run')
    assert final['step'] == 6


@pytest.mark.slow
def test_a_head_around_the_model_stays_as_it_is_drawn(trained, exported):
    found = Run.from_config(loop.resolve(tiny_config()))
    head = {
        'kernel': jax.ShapeDtypeStruct(
            (32, 2), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
    }
    wanted = {'trunk': found.abstract_params, 'head': head}
    drawn = {'trunk': jax.tree.map(jnp.zeros_like, found.init_params()), 'head': {'kernel': jnp.ones((32, 2))}}
    params, new = with_pretrained(drawn, wanted, exported)
    assert new == ['head']
    assert_trees_equal(params['trunk'], read_state(trained).params)
    assert params['head'] is drawn['head']


def test_the_command_says_where_it_started(exported, tmp_path):
    flags = ['--config=configs/quickstart.py:runlocal', f'--workdir={tmp_path / "run"}', f'--init_from={exported}']
    code, out, err = call('train.py', *flags)
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'exported does not fit the config: blocks.0.short_convolution.weights is absent there' in err
    assert not (tmp_path / 'run').exists()
    code, _, err = call('train.py', *flags, '--fork=elsewhere')
    assert code == 2
    assert 'a run starts from one of them' in err


def test_what_is_no_export_is_refused(exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'neither a work directory, nor a checkpoint in one, nor an export'):
        loop.train(tiny_config(init_from=str(tmp_path)), tmp_path / 'run')
    (tmp_path / 'model.safetensors').write_text('no weights')
    with pytest.raises(UserError, match='cannot be read'):
        loop.train(tiny_config(init_from=str(tmp_path)), tmp_path / 'run')
    with pytest.raises(UserError, match=r'blocks\.1\..* is absent there, and the new model needs it'):
        loop.train(tiny_config(init_from=str(exported), model__num_layers=3), tmp_path / 'run')
    with pytest.raises(UserError, match='there is no language model in the model of the config'):
        with_pretrained(None, {'head': {'kernel': np.zeros(2)}}, exported)
    monkeypatch.setitem(sys.modules, 'safetensors.numpy', None)
    with pytest.raises(UserError, match=r'init_from needs safetensors: pip install -r requirements-export\.txt'):
        loop.train(tiny_config(init_from=str(exported)), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
