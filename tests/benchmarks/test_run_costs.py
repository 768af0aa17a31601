"""What a run costs besides its steps: told from lines with times, and measured of a run of seconds."""

import json
import sys

import pytest

from gau.benchmarks.run_costs import Line, costs, follow
from gau.errors import UserError
from tests.programs import call
from tests.training.test_commands import run

CONFIG = '--config=configs/lm.py:runlocal'


def lines(*, pause_after: dict[int, float], evaluations: dict[int, float], steps: int) -> list[Line]:
    now, found = 5.0, []
    for step in range(1, steps + 1):
        found.append(Line(now, step, 'train'))
        if step in evaluations:
            now += evaluations[step]
            found.append(Line(now, step, 'eval/valid'))
        now += 0.25 + pause_after.get(step, 0.0)
    return found


def test_costs_of_a_run():
    # Step 2 is slow: something compiles a second time.
    told = lines(pause_after={1: 3.0, 5: 0.5, 10: 0.75}, evaluations={4: 2.0, 8: 1.0, 12: 1.0}, steps=12)
    found = costs(told, save_every=5)
    assert (found.start, found.step) == (5.0, 0.25)
    assert found.saves == [0.5, 0.75]
    assert found.evaluations == [2.0, 1.0]


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match='want more'):
        costs(lines(pause_after={}, evaluations={}, steps=4), save_every=2)


def test_a_run_that_fails_says_why(tmp_path):
    command = [sys.executable, '-c', 'import sys; sys.exit("error: no such data")']
    with pytest.raises(UserError, match='exit code 1: error: no such data'):
        follow(command, tmp_path / 'run', environment={})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--eval_every=25'], 'step 25 is both saved and evaluated'),
        (['--config.data.batch_size=0'], 'data.batch_size=0'),
        (['--config.eval.every_tokens=1000'], 'eval.every_tokens is for --steps'),
        (['--config.data.source=text:nowhere/*.txt'], 'nowhere'),
    ],
)
def test_bad_calls_are_one_line(arguments, message):
    code, _, err = call('scripts/benchmark_run.py', CONFIG, *arguments)
    assert code == 2
    assert message in err
    assert err.count('\n') == 1


@pytest.mark.slow
def test_both_runs_are_measured():
    code, out, err = run('scripts/benchmark_run.py', CONFIG, '--steps=12', '--save_every=5', '--eval_every=4')
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert all(len(run['saves']) == 2 and len(run['evaluations']) == 2 for run in found.values())
