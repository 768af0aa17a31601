"""The sweep's command with a stand-in for train.py; with the real one: test_acceptance.py."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from gau.experiments.directory import SweepDirectory
from gau.experiments.runner import Runner
from gau.experiments.sweep import Program, find_points
from gau.training import workdir as files
from tests.conftest import ROOT
from tests.programs import call

_FAKED = """
import runpy, sys
sys.path.insert(0, 'scripts')
from pathlib import Path
sys.argv = ['scripts/sweep.py', *sys.argv[1:]]
sys.path.insert(0, '.')
from gau.experiments import process
process.TRAIN = Path('tests/experiments/fake_train.py')
runpy.run_path('scripts/sweep.py', run_name='__main__')
"""
CONFIG = '--config=tests/experiments/program.py'


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, '-c', _FAKED, CONFIG, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def say(*arguments):
    """What the command says before it runs anything."""
    return call('scripts/sweep.py', CONFIG, *arguments)


def test_a_point_that_ends_above_its_lowest_loss_says_so(tmp_path):
    directory = SweepDirectory(tmp_path, None, '', find_points(Program(str(ROOT / CONFIG.partition('=')[2])), 'seed:1'))
    workdir = directory.workdir('seed_0')
    workdir.mkdir()
    files.write_json(workdir / files.FINAL, {'step': 9, 'eval': {'valid': {'loss': 3.5}}})
    rows = [{'step': step, 'split': 'eval/valid', 'loss': loss} for step, loss in ((3, 3.6), (6, 3.25), (9, 3.5))]
    told = []
    runner = SimpleNamespace(_directory=directory, _look=lambda task: directory.progress(task.name), _tell=told.append)
    for kept in (rows, rows[:1] + rows[2:]):
        (workdir / files.METRICS).write_text(''.join(json.dumps(row) + '\n' for row in kept))
        Runner._finish(runner, SimpleNamespace(name='seed_0'))
    lines = ['seed_0: finished, loss 3.5000 (lowest 3.2500 at step 6)', 'seed_0: finished, loss 3.5000']
    assert told == lines


def losses(directory):
    return {path.parent.name: files.read_json(path)['eval']['valid']['loss'] for path in directory.glob('*/final.json')}


def starts(directory):
    lines = [json.loads(line) for line in (directory / 'attempts.jsonl').read_text().splitlines()]
    return [line['point'] for line in lines if line['event'] == 'start']


def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_rows(directory, count, runs):
    def reached():
        return sum(len(files.read_metrics(path)) >= count for path in directory.glob('*/metrics.jsonl')) >= runs

    wait_for(reached)


def test_runs_all_once_and_then_nothing(tmp_path):
    code, out, err = run('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', '--per_device=3')
    assert code == 0, err
    assert 'finished: 4 of 4 points' in out
    assert losses(tmp_path)['chunk_size_16-seed_1'] == pytest.approx(5 / 12 + 0.16 + 0.001)
    assert sorted(starts(tmp_path)) == sorted(losses(tmp_path))
    # The same again, and grown by a seed.
    code, _, err = run('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}')
    assert (code, len(starts(tmp_path))) == (0, 4), err
    code, out, err = run('--sweep=chunk_size,seed:3', f'--workdir={tmp_path}', '--per_device=2')
    assert (code, len(starts(tmp_path))) == (0, 6), err
    assert 'finished before: 4 of 6 points' in out


def test_failing_points_are_tried_three_times_and_reported_with_their_last_line(tmp_path):
    code, out, err = run('--sweep=rate:0.001:13.0:7.0:5.0', f'--workdir={tmp_path}', '--per_device=2')
    assert code == 1, err
    assert 'finished: 2 of 4 points' in out
    assert 'learning_rate_13 failed 3 times, exit code 1: RuntimeError: as it should' in out
    # Bad input is not tried again.
    assert 'learning_rate_5 failed once, exit code 2: error: learning rate 5 is bad input' in out
    assert starts(tmp_path).count('learning_rate_7') == 2


def test_a_point_that_diverges_is_not_started_again(tmp_path):
    arguments = ('--sweep=rate:0.001:11.0', f'--workdir={tmp_path}', '--per_device=2')
    for times in range(2):
        code, out, err = run(*arguments)
        assert code == 1, err
        assert 'finished: 1 of 2 points; diverged: 1\nlearning_rate_11 diverged at step 4\n' in out, times
        assert starts(tmp_path).count('learning_rate_11') == 1
    _, out, _ = say(*arguments[:2], '--dry_run')
    assert [line.split()[-1] for line in out.splitlines()[-3:-1]] == ['finished', 'diverged']
    code, _, err = call('scripts/report.py', str(tmp_path))
    assert (code, err) == (0, 'left out, diverged: learning_rate_11 at step 4\n')
    # Whoever knows better takes the file away.
    (tmp_path / 'learning_rate_11' / files.DIVERGED).unlink()
    run(*arguments)
    assert starts(tmp_path).count('learning_rate_11') == 2


def test_refused_points_keep_the_exit_code_from_0(tmp_path):
    code, out, err = run('--sweep=heads', f'--workdir={tmp_path}')
    assert code == 1, err
    assert 'REFUSED: model.num_heads=5' in out
    assert 'finished: 1 of 1 points; refused: 1\n' in out


def test_a_killed_sweep_and_a_killed_point_go_on_with_the_same_command(tmp_path):
    arguments = ('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', '--per_device=4')
    sweep = start(*arguments, FAKE_HOLD='3')
    wait_for_rows(tmp_path, 3, runs=4)
    victim = next(tmp_path.glob('*/.pid'))
    os.kill(int(victim.read_text()), signal.SIGKILL)
    sweep.kill()
    sweep.communicate()
    if sys.platform == 'linux':
        # Nobody trains on behind the back of the dead.
        wait_for(
            lambda: all(
                'saved at step' in log.read_text() for log in tmp_path.glob('*.log') if log.stem != victim.parent.name
            )
        )
    assert not losses(tmp_path)
    code, out, err = run(*arguments)
    assert code == 0, err
    assert 'resuming at or before step' in out
    assert len(losses(tmp_path)) == 4
    for path in tmp_path.glob('*/metrics.jsonl'):
        assert [row['step'] for row in files.read_metrics(path)] == list(range(1, 13))


def test_a_killed_point_is_started_again_by_the_sweep_itself(tmp_path):
    sweep = start('--sweep=chunk_size', f'--workdir={tmp_path}', '--per_device=2', FAKE_HOLD='3')
    wait_for_rows(tmp_path, 3, runs=2)
    os.kill(int((tmp_path / 'chunk_size_16' / '.pid').read_text()), signal.SIGKILL)
    (tmp_path / 'release').touch()
    out, err = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, err
    assert 'killed by SIGKILL' in out
    assert sorted(starts(tmp_path)) == ['chunk_size_16', 'chunk_size_16', 'chunk_size_32']


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_waits_until_all_have_saved(tmp_path, number, code):
    sweep = start('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', '--per_device=2', FAKE_HOLD='3')
    wait_for_rows(tmp_path, 3, runs=2)
    # timeout(1) sends its signal twice, to the process and to its group.
    sweep.send_signal(number)
    time.sleep(0.1)
    sweep.send_signal(number)
    out, err = sweep.communicate(timeout=600)
    assert sweep.returncode == code, err
    assert out.count('stopped, saved at step') == 2
    assert 'finished: 0 of 4 points; the same command goes on with the rest\n' in out
    assert len(starts(tmp_path)) == 2


def test_one_point_by_its_number(tmp_path):
    for number in (2, 0):
        code, _, err = run('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', f'--point={number}')
        assert code == 0, err
    assert sorted(losses(tmp_path)) == ['chunk_size_16-seed_0', 'chunk_size_32-seed_0']
    for number, hint in ((4, 'points 0 to 3'), (-1, 'points 0 to 3')):
        code, _, err = say('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', f'--point={number}')
        assert (code, err.count('\n')) == (2, 1)
        assert hint in err
    code, _, err = say('--sweep=heads', f'--workdir={tmp_path / "other"}', '--point=1')
    assert code == 2
    assert 'does not divide' in err


def test_two_sweeps_at_once_in_one_directory_run_nothing_twice(tmp_path):
    arguments = ('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', '--per_device=2')
    processes = [start(*arguments) for _ in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    for path in tmp_path.glob('*/metrics.jsonl'):
        assert [row['step'] for row in files.read_metrics(path)] == list(range(1, 13))


def test_directories_of_others_are_refused_in_one_line(tmp_path):
    sweep = tmp_path / 'sweep'
    assert run('--sweep=chunk_size', f'--workdir={sweep}')[0] == 0
    before = sorted(tmp_path.rglob('*'))
    (tmp_path / 'file').write_text('precious')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'notes.txt').write_text('precious')
    for arguments, hint in (
        (['--sweep=expansion', f'--workdir={sweep}'], 'its point chunk_size_16 is not in this one'),
        (['--sweep=chunk_size', '--config.steps=3', f'--workdir={sweep}'], 'steps: 12 -> 3'),
        (['--sweep=chunk_size', f'--workdir={tmp_path / "file"}'], 'is not a directory'),
        (['--sweep=chunk_size', f'--workdir={tmp_path / "other"}'], 'holds no sweep'),
        (['--sweep=chunk_size'], '--workdir=DIR must be given'),
        ([f'--workdir={sweep}'], '--sweep=NAME must be given'),
    ):
        code, _, err = say(*arguments)
        assert (code, err.count('\n')) == (2, 1), err
        assert hint in err
    assert (
        sorted(set(tmp_path.rglob('*')) - {tmp_path / 'file', tmp_path / 'other', tmp_path / 'other/notes.txt'})
        == before
    )


def test_a_sweep_that_cannot_begin_leaves_its_directory_to_others(tmp_path):
    wrong = f'--config.data.tokenizer=sentencepiece:{tmp_path}/nowhere'
    code, _, err = say('--sweep=chunk_size', f'--workdir={tmp_path}/sweep', wrong)
    assert (code, 'cannot read' in err) == (2, True), err
    assert not (tmp_path / 'sweep').exists()


def test_a_dry_run_of_a_directory_counts_what_is_not_finished(tmp_path):
    assert run('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', '--point=1')[0] == 0
    _, out, err = say('--sweep=chunk_size,seed:2', f'--workdir={tmp_path}', '--dry_run')
    *_, head, first, second, third, fourth, total = out.splitlines()
    assert second.endswith('  finished'), out + err
    hours = [line.split()[-1] for line in (head, first, third, fourth)]
    assert hours == ['hours', '<0.001', '<0.001', '<0.001']
    assert total.startswith('what is left: <0.001 hours on one H100')
    code, _, err = say('--sweep=expansion', f'--workdir={tmp_path}', '--dry_run')
    assert (code, err.count('\n')) == (2, 1)
    assert 'is the directory of another sweep' in err


def test_dry_run_writes_nothing(tmp_path):
    code, out, err = say('--sweep=chunk_size,seed:2', f'--workdir={tmp_path / "none"}', '--dry_run', '--chip=v4')
    assert code == 0, err
    assert 'hours on one TPU v4' in out
    assert not (tmp_path / 'none').exists()
