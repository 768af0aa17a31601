"""Real runs: a sweep killed in the middle ends like an undisturbed one, and is reported with intervals and p."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gau.experiments import publish
from gau.training import workdir as files
from tests.conftest import ROOT
from tests.training.tiny import read_metrics

CONFIG = '--config=tests/experiments/program.py'


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def wait_for_step(directory, step):
    """Waits until a run of the sweep has come so far; returns its work directory."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for path in directory.glob('*/metrics.jsonl'):
            if any(row['step'] >= step for row in files.read_metrics(path)):
                return path.parent
        time.sleep(0.02)
    raise AssertionError('no run came so far')


def kill_run(workdir):
    """Kills the process that trains in a work directory, and no other."""
    for process in os.listdir('/proc'):
        if process.isdecimal():
            try:
                with open(f'/proc/{process}/cmdline', 'rb') as file:
                    arguments = file.read().split(b'\0')
            except OSError:
                continue
            if f'--workdir={workdir}'.encode() in arguments:
                os.kill(int(process), signal.SIGKILL)


def test_a_killed_run_of_a_sweep_ends_like_an_undisturbed_one(tmp_path):
    sweep = start('scripts/sweep.py', CONFIG, '--sweep=seed:2', f'--workdir={tmp_path / "sweep"}')
    kill_run(wait_for_step(tmp_path / 'sweep', 6))
    out, err = sweep.communicate(timeout=1200)
    assert sweep.returncode == 0, out + err
    code, _, err = run('train.py', CONFIG, '--config.seed=0', f'--workdir={tmp_path / "alone"}')
    assert code == 0, err
    assert read_metrics(tmp_path / 'sweep' / 'seed_0') == read_metrics(tmp_path / 'alone')
    code, out, err = run('scripts/report.py', str(tmp_path / 'sweep'))
    assert code == 0, err
    assert '(n=2)' in out
    assert publish.check(tmp_path / 'sweep' / 'report.jsonl') == publish.SAME


@pytest.mark.slow
def test_two_chunk_sizes_by_two_expansions_by_two_seeds(tmp_path):
    arguments = ['scripts/sweep.py', '--config=configs/quickstart.py:runlocal', '--per_device=2']
    arguments += ['--sweep=model.chunk_size:16:32,model.expansion_factor:1.0:2.0,seed:2']
    arguments += ['--config.eval.every_steps=5']
    code, _, err = run(*arguments, f'--workdir={tmp_path / "undisturbed"}')
    assert code == 0, err
    killed = tmp_path / 'killed'
    sweep = start(*arguments, f'--workdir={killed}')
    kill_run(wait_for_step(killed, 11))
    time.sleep(1)
    sweep.kill()
    sweep.communicate()
    code, out, err = run(*arguments, f'--workdir={killed}')
    assert code == 0, out + err
    names = sorted(path.parent.name for path in killed.glob('*/final.json'))
    assert len(names) == 8
    for name in names:
        assert read_metrics(killed / name) == read_metrics(tmp_path / 'undisturbed' / name)
    output = tmp_path / 'table'
    code, out, err = run('scripts/report.py', str(killed), '--against=model.chunk_size=32', f'--output={output}')
    assert code == 0, err
    table = [line.split('|') for line in out.splitlines() if line.startswith('| ') and '±' in line]
    assert len(table) == 4
    p = next(line[6].strip() for line in table if line[1].strip() == '16')
    assert 0 <= float(p) <= 1
    for figure in ('tokens', 'time', 'values', 'speed'):
        assert (tmp_path / f'table_{figure}.png').stat().st_size > 5000


BAD = {
    'no directory': ([], 'no directory is given'),
    'nothing there': (['no_such_directory'], 'holds neither a run nor a sweep'),
    'unknown flag': (['x', '--agianst=y'], 'agianst'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_reports_are_one_line_and_code_2(name):
    arguments, hint = BAD[name]
    code, out, err = run('scripts/report.py', *arguments)
    assert (code, err.count('\n'), out) == (2, 1, ''), err
    assert hint in err
