"""The table of docs/tpu_v4_64.md: which programs it is made of, and what is made of them."""

import pytest

from gau.benchmarks import tpu_table


def row(stack, layers, *, cycles=0.0, kernels=None, **fields):
    seconds = {'compute': 0.01, 'memory': 0.0, 'links': 0.002, 'compiler': cycles, 'kernels': kernels}
    return {
        **{'model': 'flash', 'size': 'base', 'objective': 'lm', 'context': 512, 'impl': 'pallas', 'commit': 'abc'},
        **{'mesh': {'data': 64, 'sequence': 1}, 'layer_stack': stack, 'num_layers': layers, 'seconds': seconds},
        **{'flops': 2e12, 'model_flops': 1e12, 'argument_bytes': 2**30, 'temporary_bytes': 2**30},
        **{'total_bytes': 2**31, 'traffic_bytes': layers * 2**30, 'step_seconds_bound': 0.01},
        'collectives': {'all-reduce': {'count': 2, 'bytes': 2**20}},
        **fields,
    }


def test_numbers_of_all_layers_lie_on_a_straight_line():
    few, more = row('unrolled', 2, cycles=0.010, kernels=0.001), row('unrolled', 4, cycles=0.014, kernels=0.002)
    whole = tpu_table.extrapolated(few, more, 24)
    assert whole['seconds'] == pytest.approx(
        {'compute': 0.01, 'memory': 0, 'links': 0.002, 'compiler': 0.054, 'kernels': 0.012}
    )
    assert whole['traffic_bytes'] == 24 * 2**30
    line = tpu_table.table([row('scan', 24, cycles=0.06, kernels=0.012), few, more]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert dict(zip(tpu_table.COLUMNS, cells, strict=True)) == {
        **{'model': '`flash`', 'impl': '`pallas`', 'objective': 'lm', 'context': '512', 'mesh': 'data 64'},
        **{'memory GiB': '1.00 / 1.00 / 2.00', 'TFLOP': '2.00 / 1.00', 'collectives': 'all-reduce 2 / 1'},
        **{'scan: traffic GiB': '24.00', 'scan: ms': '74.0 = 60.0 + 2.0 + 12.0'},
        **{'unrolled: traffic GiB': '24.00', 'unrolled: ms': '68.0 = 54.0 + 2.0 + 12.0', 'MFU': '0.07'},
        'commit': 'abc',
    }


def test_a_line_without_all_of_its_programs_is_left_out():
    assert len(tpu_table.table([row('scan', 24), row('unrolled', 2)]).splitlines()) == 2


def test_where_the_compiler_estimates_nothing_there_is_a_bound():
    rows = [row('scan', 24, cycles=None), row('unrolled', 2, cycles=None), row('unrolled', 4, cycles=None)]
    assert '| (10.0) |' in tpu_table.table(rows)


def test_what_the_file_has_is_not_compiled_again():
    plan = list(tpu_table.configs())
    compiled = {(config.model.layer_stack, config.model.num_layers) for config in plan}
    assert compiled == {('scan', None), *(('unrolled', layers) for layers in tpu_table.FEW_LAYERS)}
    done = [row('scan', 24), row('unrolled', 4)]
    known = [config for config in plan if any(tpu_table._describes(row, config) for row in done)]
    assert [(c.model.name, c.data.context, c.model.num_layers) for c in known] == [
        ('flash', 512, None),
        ('flash', 512, 4),
    ]
