"""scripts/export.py with the format that needs no other framework, and what it refuses."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import gau
from gau.data import tokenizers
from gau.errors import UserError
from gau.export import tokenizer_files
from gau.export.exporting import FORMATS, export
from gau.models.weights import restored
from tests.conftest import ROOT
from tests.programs import call
from tests.test_package import requirements
from tests.training.tiny import assert_trees_equal


@pytest.fixture(scope='module')
def trained(tiny_run):
    return tiny_run


def test_the_command_writes_weights_config_and_card(trained, tmp_path):
    code, out, err = call('scripts/export.py', f'--workdir={trained}', f'--output={tmp_path / "out"}')
    assert (code, err) == (0, '')
    files = {'README.md', 'config.json', 'model.safetensors', 'training_config.json'}
    assert {path.name for path in (tmp_path / 'out').iterdir()} == files
    assert all(name in out for name in files)
    opened, params, step = gau.load_run(trained)
    weights = load_file(tmp_path / 'out/model.safetensors')
    assert_trees_equal(restored(weights, params, where='OUT'), params)
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert config['model']['chunk_size'] == 16
    assert (config['causal'], config['vocab_size'], config['context']) == (True, 260, 48)
    assert config['tokenizer']['bos_id'] == opened.tokenizer.bos_id
    assert json.loads((tmp_path / 'out/training_config.json').read_text())['steps'] == 6
    card = (tmp_path / 'out/README.md').read_text()
    loss = json.loads((trained / 'final.json').read_text())['eval']['valid']['loss']
    for fact in ('license: apache-2.0', '576 tokens', f'{loss:.4f} nats', 'embedded', 'commit ', f'--step={step}'):
        assert fact in card


def test_an_earlier_step_is_another_model_and_says_so(trained, tmp_path):
    export(trained, tmp_path / 'out', step=4)
    export(trained, tmp_path / 'last')
    one, other = (load_file(tmp_path / name / 'model.safetensors') for name in ('out', 'last'))
    assert not np.array_equal(one['embedding.weight'], other['embedding.weight'])
    assert '4 steps' in (tmp_path / 'out/README.md').read_text()


def test_bad_input_is_one_line_and_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    code, out, err = call('scripts/export.py', '--workdir=nowhere', f'--output={tmp_path / "out"}')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'nowhere' in err
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/mine').write_text('keep')
    with pytest.raises(UserError, match='full exists already'):
        export(trained, tmp_path / 'full')
    with pytest.raises(UserError, match=r'did you mean "onnx"'):
        export(trained, tmp_path / 'out', format='onyx')
    with pytest.raises(UserError, match='no checkpoint of step 5'):
        export(trained, tmp_path / 'out', step=5)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'safetensors, transformers: pip install -r requirements-export\.txt'):
        export(trained, tmp_path / 'out', format='huggingface')
    assert [path.name for path in tmp_path.iterdir()] == ['full']
    assert (tmp_path / 'full/mine').read_text() == 'keep'


def test_a_write_that_fails_leaves_nothing_behind(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'copyfile', lambda *_: pytest.fail('bytes have no file'))
    monkeypatch.setattr('gau.export.card.write', lambda *_, **__: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        export(trained, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_s_file_comes_along(tmp_path):
    (tmp_path / 'mine.json').write_text(BPE)
    tokenizer = tokenizers.load(f'huggingface:{tmp_path / "mine.json"}')
    tokenizer_files.copy(tokenizer, tmp_path)
    described = tokenizer_files.describe(tokenizer)
    assert described['file'] == 'tokenizer.json'
    copied = tokenizers.load(f'huggingface:{tmp_path / described["file"]}')
    assert copied.fingerprint == tokenizer.fingerprint == described['fingerprint']


def test_each_library_is_in_the_requirements():
    wanted = {requirement.name for requirement in requirements(ROOT / 'requirements-export.txt')}
    assert {name for names in FORMATS.values() for name in names} <= wanted


BPE = json.dumps(
    {
        'version': '1.0',
        'added_tokens': [],
        'normalizer': None,
        'pre_tokenizer': None,
        'post_processor': None,
        'decoder': None,
        'truncation': None,
        'padding': None,
        'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'ab': 2}, 'merges': [['a', 'b']], 'unk_token': None},
    }
)
