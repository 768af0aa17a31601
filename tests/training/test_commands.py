"""The commands as a user calls them: exit codes, one-line errors, and death by signal at any moment."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gau.errors import UserError
from gau.training import evaluate, loop, workdir
from tests.conftest import ROOT
from tests.programs import call
from tests.training.processes import train_with
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config

TINY = [
    '--config=configs/quickstart.py:runlocal',
    '--config.model.num_layers=1',
    '--config.model.model_dim=32',
    '--config.data.batch_size=2',
    '--config.data.context=64',
    '--config.steps=24',
    '--config.checkpoint.every_steps=5',
    '--config.eval.every_steps=10',
    '--config.eval.max_tokens=500',
]


def start(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def run(*arguments):
    process = start(*arguments)
    # A guard against hanging, whatever else the machine does.
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp('commands') / 'undisturbed'
    code, _, err = call('train.py', *TINY, f'--workdir={path}')
    assert code == 0, err
    return path


KILL, INT, TERM = (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)


@pytest.mark.parametrize(
    'deeds',
    [
        # While a checkpoint is being written. (Signals that save: test_loop.py, and test_processes.py from outside.)
        [(*KILL, 16)],
        # Before the first one as well.
        pytest.param([(*KILL, 3), (*INT, 3), (*KILL, 16), (*TERM, 18)], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_killed_or_told_to_stop_at_any_moment_and_resumed_ends_the_same(undisturbed, tmp_path, deeds):
    for signum, expected, step in deeds:
        disturbed = train_with(f'os.kill(os.getpid(), {int(signum)})', step=step)
        code, _, err = run(*disturbed, *TINY, f'--workdir={tmp_path}')
        assert code == expected, err
        if signum != signal.SIGKILL:
            assert 'saved at step' in err
            assert 'Traceback' not in err
    code, _, err = call('train.py', *TINY, f'--workdir={tmp_path}')
    assert code == 0, err
    assert 'resumed at step' in err
    assert_trees_equal(read_state(tmp_path), read_state(undisturbed))
    assert read_metrics(tmp_path) == read_metrics(undisturbed)


@pytest.mark.slow
def test_killed_at_random_times(undisturbed, tmp_path):
    start_time = time.monotonic()
    code, _, err = run('train.py', *TINY, f'--workdir={tmp_path / "timed"}')
    assert code == 0, err
    whole = time.monotonic() - start_time
    path = tmp_path / 'killed'
    for share in np.random.default_rng(0).uniform(0.2, 1.1, size=15):
        process = start('train.py', *TINY, f'--workdir={path}')
        try:
            process.communicate(timeout=share * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    code, _, err = run('train.py', *TINY, f'--workdir={path}')
    assert code == 0, err
    assert_trees_equal(read_state(path), read_state(undisturbed))
    assert read_metrics(path) == read_metrics(undisturbed)


def test_eval_reads_the_work_directory_alone(undisturbed):
    code, out, err = call('eval.py', f'--workdir={undisturbed}', '--contexts=64,128', '--step=20', '--max_tokens=500')
    assert code == 0, err
    assert (undisturbed / 'eval.jsonl').read_text().count('\n') == 2
    assert (undisturbed / 'plots' / 'loss_by_position_step_20.png').is_file()
    assert all(len(line) <= 100 for line in out.splitlines() if str(undisturbed) not in line)


BAD = {
    'no config file': (['--config=configs/nothing.py'], 'nothing.py'),
    'unknown argument': (['--config=configs/quickstart.py:modle=flash'], 'did you mean "model"'),
    'unknown field': ([*TINY, '--config.optimizer.learning_rat=1'], 'did you mean "learning_rate"'),
    'unknown section': ([*TINY, '--config.optimiser.learning_rate=1'], 'did you mean "optimizer"'),
    'wrong type': ([*TINY, '--config.steps=many'], '--config.steps=many'),
    'unknown flag': ([*TINY, '--workdirr=x'], 'workdir'),
    'stray argument': ([*TINY, 'stray'], 'unexpected argument "stray"'),
    'unknown model': ([*TINY, '--config.model.name=flsh'], 'did you mean "flash"'),
    'against the program': (['--config=configs/lm.py:runlocal', '--config.model.num_heads=4'], '.decay_gate=None'),
    'odd width with RoPE': ([*TINY, '--config.model.query_key_dim=15'], 'query_key_dim'),
    'two durations': ([*TINY, '--config.tokens=1000', '--config.epochs=1'], 'exactly one of steps, tokens, epochs'),
    'missing text': ([*TINY, '--config.data.source=text:no_such_file.txt'], 'no_such_file.txt'),
    'batch and accumulation': ([*TINY, '--config.optimizer.accumulation_steps=3'], 'accumulation_steps'),
    'mesh': ([*TINY, '--config.mesh.tensor=64'], 'multiply'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_code_2(name, tmp_path):
    arguments, hint = BAD[name]
    # Once as a user calls it.
    start = run if name == 'unknown flag' else call
    code, out, err = start('train.py', *arguments, f'--workdir={tmp_path / "run"}')
    assert code == 2, err
    assert hint in err
    assert err.count('\n') == 1
    assert err.startswith('error: ')
    assert not out
    assert not (tmp_path / 'run').exists()


def test_unusable_work_directories_are_one_line(undisturbed, tmp_path):
    """Each a UserError; that the command writes it and ends with code 2 is seen once."""
    (tmp_path / 'file').write_text('precious')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'notes.txt').write_text('precious')
    code, _, err = call('train.py', *TINY, f'--workdir={tmp_path / "other"}')
    assert (code, err.count('\n')) == (2, 1), err
    assert 'not empty' in err
    with pytest.raises(UserError, match='not a directory'):
        loop.train(tiny_config(), tmp_path / 'file')
    config = workdir.read_config(undisturbed)
    config.seed = 1
    with pytest.raises(UserError, match='seed: 0 -> 1'):
        loop.train(config, undisturbed)
    with pytest.raises(UserError, match='holds no run'):
        evaluate.evaluate(tmp_path / 'other')
    with pytest.raises(UserError, match='valid'):
        evaluate.evaluate(undisturbed, splits=['vald'])
    assert [(path.name, path.read_text()) for path in (tmp_path / 'other').iterdir()] == [('notes.txt', 'precious')]
    assert (tmp_path / 'file').read_text() == 'precious'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_unwritable_work_directory_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = run('train.py', *TINY, f'--workdir={tmp_path / "run"}')
    assert (code, err.count('\n')) == (2, 1), err
    assert 'cannot be written' in err


def test_importing_gau_is_light():
    code, _, err = run('-X', 'importtime', '-c', 'import gau, gau.training.config, configs.lm')
    assert code == 0
    for heavy in ('jax', 'flax', 'grain', 'orbax', 'matplotlib', 'tensorflow_datasets', 'sentencepiece', 'numpy'):
        assert f'| {heavy}\n' not in err.replace('|   ', '| ').replace('  ', ''), heavy


def test_an_interrupt_that_comes_in_a_callback_is_not_lost():
    program = """
import gc, signal, time
from gau import cli

# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    came = []
    def callback(phase, info):
        if not came:
            came.append(phase)
            signal.raise_signal(signal.SIGINT)
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(30)

cli.run(main)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')


def test_a_run_that_was_not_evaluated_is_no_quickstart(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / 'run', ignore=shutil.ignore_patterns('eval.jsonl'))
    code, _, err = call('scripts/quickstart_report.py', f'--workdir={tmp_path}/run')
    assert (code, err.count('\n')) == (2, 1), err
    assert 'is no quickstart that was trained and evaluated' in err
