"""The directory that `transformers` opens: the model, its tokenizer, what it writes, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import gau
from gau.data import tokenizers
from gau.errors import UserError
from gau.export import fast_tokenizer, huggingface
from gau.export.exporting import export
from gau.export.huggingface import config_of
from gau.sampling import generation
from gau.training import loop
from tests.conftest import ROOT
from tests.data.test_tokenizers import specs  # noqa: F401
from tests.models.tiny import CASES
from tests.models.tiny import tiny_config as tiny_model
from tests.training.test_commands import run
from tests.training.tiny import tiny_config

transformers = pytest.importorskip('transformers', minversion='5.24', reason='requirements-export.txt')
pytest.importorskip('torch', reason='exports are opened with torch, which is no requirement of training')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('huggingface') / 'trained'
    loop.train(tiny_config(), path)
    return path


def test_a_process_without_jax_writes_the_same(trained, tmp_path):
    prompt, n = 'def f(é):\n', 40
    command = ('scripts/export.py', f'--workdir={trained}', f'--output={tmp_path / "out"}', '--format=huggingface')
    code, _, err = run(*command)
    assert code == 0, err
    shutil.copy(ROOT / 'tests/export/without_jax.py', tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    environment |= {'HF_HOME': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(
        [sys.executable, 'without_jax.py', 'out', prompt, str(n)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    opened, params, _ = gau.load_run(trained)
    tokens = np.concatenate([[opened.tokenizer.bos_id], opened.tokenizer.encode(prompt)])
    assert found['prompt'] == tokens.tolist()
    logits = opened.model.apply({'params': params}, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(found['logits'], logits, atol=1e-5)
    greedy = generation.SamplingParams(temperature=0)
    blocks = generation.generate(opened.model, params, [tokens], max_tokens=n, sampling=greedy, seed=0)
    expected = np.concatenate(list(blocks), axis=1)[0].tolist()
    if opened.tokenizer.eos_id in expected:
        expected = expected[: expected.index(opened.tokenizer.eos_id) + 1]
    assert found['ids'] == expected
    assert found['text'] == opened.tokenizer.decode(expected)


def test_a_masked_model_opens_as_one(tmp_path):
    loop.train(tiny_config(objective='mlm'), tmp_path / 'run')
    export(tmp_path / 'run', tmp_path / 'out', format='huggingface')
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / 'out', trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    opened, params, _ = gau.load_run(tmp_path / 'run')
    inputs = tokenizer('abc<mask>e', return_tensors='pt')
    specials = opened.tokenizer
    expected = [specials.bos_id, *b'abc', specials.mask_id, *b'e', specials.eos_id]
    assert inputs['input_ids'][0].tolist() == expected
    logits = opened.model.apply({'params': params}, jnp.asarray([expected]))
    np.testing.assert_allclose(model(**inputs).logits.detach().numpy(), logits, atol=1e-5)
    with pytest.raises(ValueError, match='AutoModelForCausalLM'):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', trust_remote_code=True)


@pytest.mark.slow
def test_a_model_without_a_state_writes_all_the_same(tmp_path):
    config = tiny_config(model__name='flash_quad', model__normalizer='paper', model__chunk_size=None)
    loop.train(config, tmp_path / 'run')
    export(tmp_path / 'run', tmp_path / 'out', format='huggingface')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', trust_remote_code=True)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')('def f(', return_tensors='pt')['input_ids']
    written = model.generate(tokens, max_new_tokens=5, do_sample=False)
    for place in range(tokens.shape[1], written.shape[1]):
        assert written[0, place] == model(written[:, :place]).logits[0, -1].argmax()


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'huggingface'])
def test_tokenizers_give_the_ids_of_training(specs, kind, causal, tmp_path):  # noqa: F811
    ours = tokenizers.load(specs[kind])
    fast_tokenizer.write(ours, tmp_path, context=512, causal=causal)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for name in ('bos', 'eos', 'pad', 'mask'):
        assert getattr(theirs, f'{name}_token_id') == getattr(ours, f'{name}_id')
    assert len(theirs) == ours.vocab_size
    for text in ('the gate', ' two  spaces\nand é 漢字 😀\t', 'x' * 50, '', 'a\n\nb'):
        own = ours.encode(text).tolist()
        end = [] if causal else [ours.eos_id]
        assert theirs(text)['input_ids'] == [ours.bos_id, *own, *end]
        assert theirs.decode(own) == ours.decode(own)
    theirs.save_pretrained(tmp_path / 'again')
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'again', trust_remote_code=True)
    assert again('the gate')['input_ids'] == theirs('the gate')['input_ids']


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_every_model_is_held_or_refused_with_the_reason(name, objective):
    def described():
        return config_of(tiny_model(name, objective), vocab_size=11, causal=objective == 'lm', context=24)

    if name in ('performer', 'linformer', 'combiner'):
        with pytest.raises(UserError, match=f'model.name={name} cannot be exported to PyTorch or ONNX'):
            described()
    else:
        assert described()['architecture'] == name


def test_a_field_that_the_file_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface, 'FIELDS', tuple(name for name in huggingface.FIELDS if name != 'global_reduction'))
    model = tiny_model('flash', 'lm')
    with pytest.raises(UserError, match=r'model\.global_reduction=\S+ is not known'):
        config_of(model, vocab_size=11, causal=True, context=24)


def test_the_files_of_the_model_know_neither_jax_nor_this_repository():
    exported = {path.name for path in huggingface.CODE}
    for path in (*huggingface.CODE, fast_tokenizer.CODE):
        lines = path.read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.lstrip().startswith(('import ', 'from '))]
        assert {name.split('.')[0] for name in imports if not name.startswith('.')} <= {
            *('inspect', 'math', 'dataclasses', 'typing', 'shutil', 'pathlib', 'torch', 'transformers', 'sentencepiece')
        }
        assert {f'{name[1:]}.py' for name in imports if name.startswith('.')} <= exported
