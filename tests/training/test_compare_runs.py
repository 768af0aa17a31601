import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / 'scripts' / 'compare_runs.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def runs(tmp_path):
    """Two runs with one step in common, and the loss of another split."""
    rows = {'a': [(10, 5.0), (20, 4.0)], 'b': [(20, 4.5), (30, 3.0)]}
    for name, losses in rows.items():
        lines = [{'step': step, 'split': 'train', 'loss': loss} for step, loss in losses]
        lines.append({'step': 20, 'split': 'eval/valid', 'loss': 9.0})
        lines.append({'step': 20, 'split': 'passkey/valid', 'accuracy': 0.5})
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return tmp_path


def test_losses_and_their_distance_at_shared_steps(runs):
    result = run(f'--workdirs={runs}/a,{runs}/b', f'--output={runs}/plots/both.png')
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1:3] == [['a', '20', '4.0000', '0.0000', '0.0000'], ['b', '30', '3.0000', '0.5000', '0.5000']]
    assert (runs / 'plots' / 'both.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('split', ['valid', 'eval/valid'])
def test_an_evaluated_split_is_named_as_in_the_result(runs, split):
    result = run(f'--workdirs={runs}/a,{runs}/b', f'--split={split}', f'--output={runs}/valid.png')
    assert result.returncode == 0, result.stderr
    assert [line.split()[:3] for line in result.stdout.splitlines()[1:3]] == [[name, '20', '9.0000'] for name in 'ab']


def test_a_line_that_a_run_is_just_writing_is_left_out(runs):
    with (runs / 'b' / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 40, "split": "tr')
    result = run(f'--workdirs={runs}/a,{runs}/b', f'--output={runs}/both.png')
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[2].split()[:3] == ['b', '30', '3.0000']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--workdirs={0}/a,{0}/c'], '{0}/c/metrics.jsonl does not exist'),
        (['--workdirs={0}/a', '--split=test'], '--split=test: {0}/a/metrics.jsonl has train, valid'),
        (['--workdirs={0}/a,{0}/b/../a'], 'two runs are called a'),
        (['--workdirs='], '--workdirs and --output must name something'),
        (['--workdirs={0}/a', '--output={0}'], '--output={0} cannot be written: Is a directory'),
        (['--workdirs={0}/a', '--output={0}/a/metrics.jsonl/x.png'], 'cannot be written: '),
    ],
)
def test_what_is_wrong_is_said_in_one_line(runs, arguments, message):
    result = run(f'--output={runs}/x.png', *(argument.format(runs) for argument in arguments))
    assert result.returncode == 2
    assert message.format(runs) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (runs / 'x.png').exists()
