"""docs/deploy.md, followed to the letter: its commands and programs, on a small run."""

import json
import re
import shlex

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.training.test_commands import run

pytest.importorskip('torch', reason='requirements-export.txt')
pytest.importorskip('transformers', minversion='5.24', reason='requirements-export.txt')
pytest.importorskip('onnxscript', reason='requirements-export.txt')
pytest.importorskip('onnxruntime', reason='requirements-export.txt')
pytest.importorskip('qwix', reason='requirements-compress.txt')
pytest.importorskip('lm_eval', reason='pip install "lm-eval[hf]"')

pytestmark = pytest.mark.slow
CONFIG = 'configs/quickstart.py:runlocal'


@pytest.fixture(scope='module')
def followed(tmp_path_factory):
    """Runs what the page says, from top to bottom, in a directory of its own; returns what its programs left."""
    folder = tmp_path_factory.mktemp('deploy')
    code, _, err = run('train.py', f'--config={CONFIG}', f'--workdir={folder / "runs/quickstart"}')
    assert code == 0, err
    page = (ROOT / 'docs/deploy.md').read_text()
    found = {'folder': folder}
    for kind, block in re.findall(r'```(bash|python)\n(.*?)```', page, re.DOTALL):
        block = block.replace('configs/quickstart.py', CONFIG)
        block = block.replace('runs/', f'{folder}/runs/').replace('out/', f'{folder}/out/')
        if kind == 'python':
            exec(block, found)
            continue
        for line in block.splitlines():
            code, _, err = run(*shlex.split(line)[1:])
            assert code == 0, err
    return found


def test_pytorch_writes_what_sample_py_writes(followed):
    sample = ['--prompt=import ', '--max_tokens=50', '--temperature=0', '--json']
    code, out, err = run('scripts/sample.py', f'--workdir={followed["folder"] / "runs/quickstart"}', *sample)
    assert code == 0, err
    written = followed['tokenizer'].decode(followed['text'], skip_special_tokens=True)
    assert written == 'import ' + json.loads(out)['text']


def test_onnx_and_its_quantised_form_give_the_logits(followed):
    ids = followed['ids']
    expected = followed['pytorch'](followed['torch'].tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(followed['logits'], expected, atol=1e-5)
    onnx = followed['folder'] / 'out/onnx'
    assert (onnx / 'int8.onnx').stat().st_size < (onnx / 'model.onnx').stat().st_size / 1.5
    assert np.abs(followed['rounded'] - expected).max() < 0.1 * np.abs(expected).max()


def test_a_second_run_started_from_the_weights(followed):
    final = json.loads((followed['folder'] / 'runs/second/final.json').read_text())
    first = json.loads((followed['folder'] / 'runs/quickstart/final.json').read_text())
    assert final['eval']['valid']['loss'] < first['eval']['valid']['loss']
