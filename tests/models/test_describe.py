import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / 'scripts' / 'describe.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_config_is_taken_apart():
    result = run('--config=configs/lm.py:model=flash,size=base', '--contexts=512,8192')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith('flash, lm, vocabulary 32,000')
    layers = next(line for line in lines if line.startswith('layer 0 to 23, each'))
    # The last of each: kilobytes a token, with a chunk's relative bias of 256 kB shared by the context.
    assert layers.split()[-5:] == ['3,642,752', '8.487', '28.2', '8.487', '27.7']
    assert lines[-1].split()[:2] == ['total', '112,002,050']


def test_models_stand_side_by_side():
    result = run('--config=configs/lm.py:size=base', '--models=flash,transformer_plus_plus', '--contexts=512')
    assert result.returncode == 0, result.stderr
    rows = dict(line.split()[:2] for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert rows['flash'] == '112,002,050'
    assert rows['transformer_plus_plus'] == '109,644,289'


def test_fields_are_explained():
    result = run('--config=configs/lm.py:model=performer', '--fields')
    assert result.returncode == 0, result.stderr
    assert 'model.feature_map: relu | favor, default relu\n' in result.stdout
    assert 'chunk_size' not in result.stdout


@pytest.mark.parametrize(('argument', 'message'), [
    ('--models=flsh', 'did you mean "flash"'),
    ('--models=linformer', 'cannot be a causal language model'),
    ('--contexts=0', 'is not a positive integer'),
])  # fmt: skip
def test_wrong_usage_is_one_line(argument, message):
    result = run('--config=configs/lm.py', argument)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
