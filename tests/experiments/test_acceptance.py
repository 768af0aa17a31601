"""Real runs: a sweep killed in the middle ends like an undisturbed one, and is reported with intervals and p."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gau.experiments import publish, report, runs
from gau.experiments.directory import SweepDirectory
from gau.experiments.report import Options
from gau.experiments.sweep import Program, find_points
from gau.training import loop
from gau.training import workdir as files
from tests.conftest import ROOT
from tests.programs import call
from tests.training.tiny import read_metrics

PROGRAM = 'tests/experiments/program.py'


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


def check_undisturbed(sweep, directory, config, expression):
    """Checks that every run of a sweep has the metrics of one that trains to its end, in this process."""
    path, _, argument = config.partition(':')
    points = find_points(Program(str(ROOT / path), argument), expression)
    assert sorted(path.parent.name for path in sweep.glob('*/final.json')) == sorted(point.name for point in points)
    for point in points:
        loop.train(point.config, directory / point.name)
        assert read_metrics(sweep / point.name) == read_metrics(directory / point.name)


@pytest.mark.slow
def test_a_killed_run_of_a_sweep_ends_like_an_undisturbed_one(tmp_path):
    path = tmp_path / 'sweep'
    sweep = start('scripts/sweep.py', f'--config={PROGRAM}', '--sweep=seed:2', f'--workdir={path}', '--per_device=2')
    kill_run(wait_for_step(path, 6))
    out, err = sweep.communicate(timeout=1200)
    assert sweep.returncode == 0, out + err
    assert 'killed by SIGKILL' in out
    check_undisturbed(path, tmp_path, PROGRAM, 'seed:2')
    found, unfinished = runs.find([path])
    assert not unfinished
    assert all(found[0].facts[name] for name in ('command', 'commits'))
    assert 'the mean over n = 2 seeds' in publish.write(report.make(found, Options()), found, path / 'report')
    assert publish.check(path / 'report.jsonl') == publish.SAME


@pytest.mark.slow
def test_two_chunk_sizes_by_two_expansions_by_two_seeds(tmp_path):
    config, killed = 'configs/quickstart.py:runlocal', tmp_path / 'killed'
    expression = 'model.chunk_size:16:32,model.expansion_factor:1.0:2.0,seed:2'
    arguments = ['scripts/sweep.py', f'--config={config}', f'--sweep={expression}', f'--workdir={killed}']
    sweep = start(*arguments, '--per_device=2')
    kill_run(wait_for_step(killed, 11))
    time.sleep(1)
    sweep.kill()
    sweep.communicate()
    code, out, err = run(*arguments, '--per_device=2')
    assert code == 0, out + err
    check_undisturbed(killed, tmp_path, config, expression)
    output = tmp_path / 'table'
    code, out, err = run('scripts/report.py', str(killed), '--against=model.chunk_size=32', f'--output={output}')
    assert code == 0, err
    heads, *table = [[cell.strip() for cell in line.split('|')] for line in out.splitlines()[:6] if '---' not in line]
    assert heads[1:3] == ['chunk_size', 'expansion_factor']
    assert len(table) == 4
    assert all('±' in line[heads.index('valid loss')] for line in table)
    p = next(line[heads.index('p')] for line in table if line[1] == '16')
    assert 0 <= float(p) <= 1
    # Two evaluations a run: the curves over tokens are those of the training loss. Two runs shared the cores, so times
    # and speeds say nothing and are left out.
    for figure in ('tokens', 'values'):
        assert (tmp_path / f'table_{figure}.png').stat().st_size > 5000
    assert sorted(tmp_path.glob('table_*.png')) == [tmp_path / f'table_{figure}.png' for figure in ('tokens', 'values')]


BAD = {
    'no directory': ([], 'no directory is given'),
    'nothing there': (['no_such_directory'], 'holds neither a run nor a sweep'),
    'unknown flag': (['x', '--agianst=y'], 'agianst'),
    'a check with flags': (['--check', '--by=model.name'], '--by does nothing with --check'),
    'a check that writes': (['--check', '--renew'], '--renew does nothing with --check'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_reports_are_one_line_and_code_2(name):
    arguments, hint = BAD[name]
    code, out, err = call('scripts/report.py', *arguments)
    assert (code, err.count('\n'), out) == (2, 1, ''), err
    assert hint in err


def test_a_sweep_without_a_finished_run_is_one_line_and_code_2(tmp_path):
    program = Program(str(ROOT / PROGRAM))
    SweepDirectory(tmp_path, program, 'seed:2', find_points(program, 'seed:2')).claim()
    code, out, err = call('scripts/report.py', str(tmp_path))
    assert (code, err.count('\n'), out) == (2, 1, ''), err
    assert 'no finished run to report; not finished: seed_0, seed_1' in err
