"""The recipes in scripts/launch: readable by their programs, with flags that train.py has, and one of them run."""

import functools
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from configs import lm
from tests.conftest import ROOT
from tests.training.processes import TINY, mesh, wait_for_step
from tests.training.test_commands import run

RECIPES = sorted((ROOT / 'scripts' / 'launch').iterdir())


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.name)
def test_recipes_can_be_read(recipe):
    if recipe.suffix == '.sh':
        subprocess.run(['bash', '-n', recipe], check=True)
    else:
        kinds = [document['kind'] for document in yaml.safe_load_all(recipe.read_text())]
        assert {'Job', 'JobSet'} & set(kinds)


def test_recipes_use_flags_and_fields_that_exist():
    flags = {}
    for program in ('train.py', 'scripts/sweep.py'):
        _, out, _ = run(program, '--config=configs/lm.py:size=base', '--helpfull')
        flags[program] = set(re.findall(r'^\s+--(?:\[no\])?([\w.]+):', out, flags=re.MULTILINE))
        assert {'workdir', 'config'} <= flags[program]
    config = lm.get_config('size=base,data=embedded')
    others = {'kill-on-bad-exit', 'gpus-per-task', 'signal', 'zone', 'worker', 'command', 'array'}
    for recipe in RECIPES:
        text = '\n'.join(line for line in recipe.read_text().splitlines() if not line.startswith('#SBATCH'))
        used = set(re.findall(r'--([a-z][\w-]*(?:\.\w+)*)', text)) - others
        assert 'workdir' in used
        program = 'scripts/sweep.py' if 'scripts/sweep.py' in text else 'train.py'
        for name in used:
            section, _, field = name.removeprefix('config.').partition('.')
            assert field in config[section] if field else name in flags[program], f'{recipe.name}: --{name}'


@pytest.mark.slow
def test_ssh_starts_and_stops_all(tmp_path):
    # In place of ssh, a program that runs the command on this machine.
    (tmp_path / 'ssh').write_text('#!/usr/bin/env bash\nshift\nexec bash -c "$*"\n')
    (tmp_path / 'ssh').chmod(0o755)
    launcher = subprocess.Popen(
        [
            *('bash', 'scripts/launch/ssh.sh', '127.0.0.1 localhost', *TINY, '--config.steps=4000'),
            *(*mesh(data=2), f'--workdir={tmp_path / "a run"}'),
        ],
        cwd=ROOT,
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, 'PORT': '29417'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has SIGINT ignored, and no shell below can take that back.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_step(tmp_path / 'a run', 2, [launcher])
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=1200)
    assert launcher.returncode == 143, err
    assert 'SIGTERM: saved at step' in err
