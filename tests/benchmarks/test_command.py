"""scripts/benchmark.py as a user calls it."""

import importlib.util
import json

import pytest

from tests.programs import call
from tests.training.test_commands import run


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--models=flsh'], 'did you mean "flash"'),
        (['--contexts=1k'], 'not a positive integer'),
        (['--models=flash@64+1k'], '"1k" is no context'),
        (['--models=flash@'], '"" is no context'),
        (['--models=flash@64', '--contexts=32'], '--contexts is for models'),
        (['--what=decode', '--remat=full'], '--remat speaks to train and forward'),
        (['--what=forward', '--optimizer=muon'], '--optimizer speaks to train'),
        (['--optimizer=sgd'], '--optimizer: "sgd" does not exist'),
        (['--what=train', '--batch_sizes=2'], '--batch_sizes speaks to decode'),
        (['--output=README.md/rows.jsonl'], '--output=README.md/rows.jsonl cannot be written: '),
        (['--output='], '--output must name a file'),
        (['--what='], '--what= names no kind of measurement'),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    code, out, err = call('scripts/benchmark.py', *arguments)
    assert (code, out) == (2, '')
    assert message in err
    assert err.count('\n') == 1


@pytest.mark.skipif(importlib.util.find_spec('torch') is not None, reason='torch is installed')
def test_a_missing_baseline_is_one_line():
    code, out, err = call('scripts/benchmark.py', '--what=train', '--models=torch_transformer_plus_plus')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'pip install -r requirements-benchmark.txt' in err


@pytest.mark.slow
def test_rows_tables_and_pictures(tmp_path):
    output = tmp_path / 'rows.jsonl'
    arguments = ['--quick', '--models=flash', '--contexts=64', '--tokens_per_step=128', f'--output={output}']
    code, out, err = run('scripts/benchmark.py', *arguments)
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row['benchmark'] for row in rows] == ['matmul', 'memory', 'train', 'forward', 'decode', 'prefill']
    assert not any('error' in row for row in rows)
    for row in rows[2:4]:
        assert row['samples'] == 10
        assert row['step_ms_min'] <= row['step_ms'] <= row['step_ms_max']
        assert row['share_of_matrix_rate'] > 0
        assert row['compiler_bytes'] > 0
    assert all(row['ms_per_token'] > 0 and row['state_bytes'] > 0 for row in rows[4:])
    assert max(len(line) for line in out.splitlines() if 'written' not in line) <= 100
    for name in ('rows_training.png', 'rows_decoding.png'):
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.slow
def test_rounds_settings_and_what_is_refused(tmp_path):
    output = tmp_path / 'rows.jsonl'
    options = [
        '--quick',
        '--what=train',
        '--contexts=64',
        '--objective=mlm',
        '--packed',
        '--optimizer=muon',
        '--rounds=2',
        f'--output={output}',
    ]
    code, out, err = run('scripts/benchmark.py', *options, '--models=flash::full:scan:2,combiner:xla')
    assert code == 0, err
    _, measured, refused = (json.loads(line) for line in output.read_text().splitlines())
    assert (measured['remat'], measured['accumulation_steps'], measured['packed']) == ('full', 2, True)
    assert measured['optimizer'] == 'muon'
    assert (measured['rounds'], measured['samples'], refused['rounds']) == (2, 20, 1)
    assert 'does not exist for combiner' in refused['error']
    assert 'flash::full:scan:2' in out
    assert run('scripts/benchmark.py', *options, '--models=combiner:xla')[0] == 1
