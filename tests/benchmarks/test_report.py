"""Rows from results, and what is shown of them."""

import pytest

from gau.benchmarks import processes, report
from gau.benchmarks.cells import Cell, Spec

COMMON = {'size': 'base', 'context': 8192, 'batch_size': 8}
RESULT = {
    'device': 'NVIDIA H100 80GB HBM3',
    'parameters': 10,
    'tokens': 65_536,
    'flops_per_token': 2e8,
    'compiler_bytes': 40 * 2**30,
    'compile_seconds': 25.0,
    'compile_cached': False,
}


def result(seconds, **more):
    return RESULT | {'seconds': seconds, 'launch_seconds': [0.001] * len(seconds)} | more


def train_row(spec=None, results=None, kind='train', **changes):
    return processes.merge(
        Cell(kind, spec or Spec('flash'), **COMMON | changes), results or [result([0.2, 0.1, 0.3], peak_bytes=2**35)]
    )


def matmul_row(flops_per_second=8e14):
    cell = Cell('matmul', Spec('matmul'), **COMMON)
    return processes.merge(cell, [{'device': RESULT['device'], 'seconds': [1.0] * 3, 'flops': flops_per_second}])


def decode_row(kind='decode', **more):
    return processes.merge(
        Cell(kind, Spec('flash'), **COMMON), [{'seconds': [0.64], 'tokens': 8 * 64, 'state_bytes': 2**20, **more}]
    )


def test_a_row_is_the_median_over_the_samples_of_all_rounds():
    row = train_row(
        results=[result([0.1, 0.2, 0.3], peak_bytes=5), result([0.2, 0.4], peak_bytes=7, compile_seconds=0)]
    )
    assert row['step_ms'] == pytest.approx(200)
    assert (row['step_ms_min'], row['step_ms_max']) == pytest.approx((100, 400))
    assert (row['step_ms_p10'], row['step_ms_p90']) == pytest.approx((140, 360))
    assert row['tokens_per_second'] == pytest.approx(65_536 / 0.2)
    assert row['round_ms'] == pytest.approx([200, 300])
    assert (row['rounds'], row['samples'], row['peak_bytes'], row['host_ms']) == (2, 5, 7, 1.0)
    # Later rounds find the program compiled.
    assert row['compile_seconds'] == 25.0
    assert not {'seconds', 'launch_seconds', 'spec', 'tokens'} & row.keys()


def test_a_round_that_fails_is_the_row():
    row = train_row(results=[result([0.1]), {'error': 'out of memory', 'compiler_bytes': 3}])
    assert row['error'] == 'out of memory'
    assert 'tokens_per_second' not in row
    assert row['compiler_bytes'] == RESULT['compiler_bytes']


def test_decoding_is_told_per_token_of_one_text():
    row = decode_row()
    assert row['ms_per_token'] == pytest.approx(10)
    assert row['tokens_per_second'] == pytest.approx(8 * 64 / 0.64)


def test_bytes_that_a_step_cannot_do_without_are_told_as_a_rate():
    row = decode_row(bytes_per_step=3.2e9)
    assert row['bytes_per_second'] == pytest.approx(3.2e11)
    rate = processes.merge(Cell('memory', Spec('memory'), **COMMON), [{'seconds': [1.0, 1.0], 'bytes': 8e11}])
    processes.add_utilisation([rate, row])
    lines = report.table([rate, row]).splitlines()
    assert lines[2].endswith(' 320 0.40')
    assert 'read and written: 800 GB/s (median of 2)' in lines[4]


def test_the_kernels_of_a_step_are_told_by_name():
    by_name = [['decode_attention_kernel', 24.0, 100.5]]
    profile = {'kernels': 80.0, 'busy_us': 250.2, 'gaps_us': 90.1, 'median_gap_us': 1.0, 'by_name': by_name}
    lines = report.table([decode_row(profile=profile)]).splitlines()
    assert lines[-2].endswith('of a step 80 kernels in 250 us, 90 us between them')
    assert lines[-1] == '   100.5 us   24.0 x decode_attention_kernel'


def test_utilisation_is_against_the_data_sheet_and_the_measured_rate():
    rows = [matmul_row(), train_row(), train_row(kind='forward'), train_row(results=[{'error': 'x'}])]
    processes.add_utilisation(rows)
    flops = 2e8 * 65_536 / 0.2
    assert rows[1]['mfu'] == pytest.approx(3 * flops / 989e12)
    assert rows[1]['share_of_matrix_rate'] == pytest.approx(3 * flops / 8e14)
    assert rows[2]['share_of_matrix_rate'] == pytest.approx(flops / 8e14)
    assert 'mfu' not in rows[3]
    alone = [train_row(results=[result([0.1], device='cpu')])]
    processes.add_utilisation(alone)
    assert (alone[0]['mfu'], alone[0]['share_of_matrix_rate']) == (None, None)


def test_the_table_fits_and_says_what_failed():
    rows = [
        matmul_row(),
        train_row(),
        train_row(Spec('torch_transformer_plus_plus', 'compiled_cudnn', None, None, 16), context=1_048_576),
        train_row(Spec('combiner', 'xla'), [{'error': 'model.impl=xla does not exist for combiner; ' + 'x' * 200}]),
        train_row(results=[result([123.4, 23.4], compile_cached=True)]),
        decode_row(),
        decode_row(error='out of memory: 144 GiB of state'),
        decode_row('prefill'),
    ]
    processes.add_utilisation(rows)
    text = report.table(rows)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert max(len(report.brief(row)) for row in rows[1:3]) <= report.WIDTH
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert 'model.impl=xla does not exist' in lines['combiner:xla']
    # A name that is too long has a line of its own.
    assert '\ntorch_transformer_plus_plus:compiled_cudnn:::16\n          ' in text
    assert 'out of memory: 144 GiB of s' in text
    assert 'cached' in text
    assert '800 TFLOP/s' in text


def test_pictures_of_what_was_measured(tmp_path):
    failed = train_row(results=[{'error': 'out of memory'}])
    assert report.plot([failed], tmp_path / 'none') == []
    rows = [train_row(), train_row(context=512, batch_size=128), failed, matmul_row()]
    rows.append(train_row(Spec('flash', overrides=(('chunk_size', 128), ('key_input', 'shifted')))))
    assert 'flash:chunk_size=128:key_input=shifted' in report.brief(rows[-1])
    (path,) = report.plot(rows, tmp_path / 'rows.v1')
    assert path == tmp_path / 'rows.v1_training.png'
    assert path.stat().st_size > 1000
    # Nothing is known of the memory of this one.
    unknown = train_row(results=[result([0.1], compiler_bytes=None)])
    assert len(report.plot([unknown, decode_row()], tmp_path / 'rows')) == 2


def test_a_panel_makes_little_of_small_differences():
    assert report._limits(9, 16) == (6, 24)
    assert report._limits(1, 5) == (1, 5)


def test_of_what_did_not_fit_only_the_memory_is_drawn(tmp_path):
    rows = [decode_row(), decode_row(error='out of memory: 1 GiB of state', state_bytes=2**30), decode_row(error='odd')]
    assert report._curves(rows, 'decode', ('state_bytes',), 2**20) == {
        ('flash', 8): [(8192, 1.0, True), (8192, 1024.0, False)]
    }
    assert report._curves(rows, 'decode', ('ms_per_token',), 1) == {('flash', 8): [(8192, pytest.approx(10), True)]}
    assert report.plot(rows[1:], tmp_path / 'rows') == []
    (path,) = report.plot(rows, tmp_path / 'rows')
    assert path.stat().st_size > 1000


def test_reading_is_told_in_more_digits_than_writing():
    text = report.table([decode_row('prefill', seconds=[0.32], tokens=8 * 131_072)])
    assert ' 0.0024 0.0024-0.0024 ' in text
