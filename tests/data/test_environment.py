"""scripts/environment.sh, with requirements that need no network."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def environment(folder):
    (folder / 'scripts').mkdir(exist_ok=True)
    for name in ('environment.sh', 'check_requirements.py'):
        shutil.copy(ROOT / 'scripts' / name, folder / 'scripts')
    (folder / 'needed.txt').write_text('pip\nnone-such; sys_platform == "elsewhere"\n')
    script = 'set -euo pipefail; source scripts/environment.sh; environment needed.txt; "$PYTHON" -m pip --version'
    variables = {name: value for name, value in os.environ.items() if name not in ('VIRTUAL_ENV', 'CONDA_PREFIX')}
    return subprocess.run(['bash', '-c', script], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_one_interrupted_while_being_made_is_made_anew_and_a_whole_one_is_reused(tmp_path):
    # What venv has when it is interrupted before it comes to pip.
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / '.venv'], check=True)
    result = environment(tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'making .venv' in result.stderr
    assert str(tmp_path) in result.stdout
    (tmp_path / '.venv/mark').touch()
    result = environment(tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'reusing .venv' in result.stderr
    assert (tmp_path / '.venv/mark').exists()
