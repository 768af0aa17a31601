"""The table of docs/tpu_v4_64.md: which programs it is made of, and what is made of them."""

import pytest

from gau.benchmarks import tpu_table
from gau.models.architectures import BEST_FLASH


def row(stack, *, cycles=0.0, kernels=None, **fields):
    seconds = {'compute': 0.01, 'memory': 0.0, 'links': 0.002, 'compiler': cycles, 'kernels': kernels}
    return {
        **{'model': 'flash', 'context': 512, 'impl': 'pallas', 'commit': 'abc', 'num_layers': 24},
        **{'mesh': {'data': 64, 'sequence': 1}, 'layer_stack': stack, 'seconds': seconds},
        **{'flops': 2e12, 'model_flops': 1e12, 'argument_bytes': 2**30, 'temporary_bytes': 2**30},
        **{'total_bytes': 2**31, 'traffic_bytes': 24 * 2**30, 'step_seconds_bound': 0.01, 'compile_seconds': 99.6},
        **fields,
    }


def cells(*rows):
    line = tpu_table.table(rows).splitlines()[-1]
    return dict(zip(tpu_table.COLUMNS, [cell.strip() for cell in line.strip('|').split('|')], strict=True))


def test_a_line_has_both_stacks_of_layers():
    scan, unrolled = row('scan', cycles=0.06, kernels=0.012, commit='def'), row('unrolled', cycles=0.03)
    assert cells(scan, unrolled) == {
        **{'model, layers': '`flash`, 24', 'impl': '`pallas`', 'context': '512', 'mesh': 'data 64'},
        **{'TFLOP': '2.00 / 1.00', 'commit': 'abc, def'},
        **{'unrolled: memory GiB': '1.00 / 1.00 / 2.00', 'unrolled: traffic GiB': '24.00', 'unrolled: s': '100'},
        **{'unrolled: ms, MFU': '32.0 = 30.0 + 2.0, 0.16'},
        **{'scan: memory GiB': '1.00 / 1.00 / 2.00', 'scan: traffic GiB': '24.00', 'scan: s': '100'},
        **{'scan: ms, MFU': '74.0 = 60.0 + 2.0 + 12.0, 0.07'},
    }
    assert len(tpu_table.table([scan, row('unrolled', context=8192)]).splitlines()) == 2, 'no line without both'


def test_flash_is_there_as_configs_have_it_and_as_the_paper_has_it():
    rows = [row(stack, fields=fields) for stack in tpu_table.STACKS for fields in (BEST_FLASH, {})]
    names = [line.split(' | ')[0] for line in tpu_table.table(rows).splitlines()[2:]]
    assert names == ['| `flash`, 24, 2 chunks', '| `flash`, 24']


def test_without_an_estimate_there_is_a_bound_and_without_room_the_reason():
    found = cells(row('scan', cycles=None), row('unrolled', error='128 G of 30.75 G'))
    assert found['scan: ms, MFU'] == '(10.0)'
    assert found['unrolled: memory GiB'] == 'does not fit: 128 G of 30.75 G'
    assert found['unrolled: s'] == ''


def test_what_the_file_has_is_not_compiled_again(tmp_path, monkeypatch):
    compiled = []

    class Found:
        def __init__(self, config):
            model, context = config.model, config.data.context
            self.row = row(model.layer_stack, model=model.name, context=context)

    def check(config, target, *, vocab_size):
        name = f'{config.model.name}{config.model.local_window or ""}'
        compiled.append((name, config.data.context, config.model.layer_stack, config.data.batch_size))
        assert (target, vocab_size, config.mesh.data * config.mesh.sequence) == ('v4:4x4x4', 32_000, 64)
        if len(compiled) == 3:
            raise KeyboardInterrupt
        return Found(config)

    monkeypatch.setattr(tpu_table.chips, 'target', lambda name: name)
    monkeypatch.setattr(tpu_table, 'check', check)
    path, lines = tmp_path / 'table.md', []
    with pytest.raises(KeyboardInterrupt):
        tpu_table.write(path, report=lines.append)
    assert len(lines) == 1
    tpu_table.write(path, report=lines.append)
    models = ('flash2', 'flash', 'transformer_plus_plus', 'flash_quad')
    wanted = {(m, n, stack, 2**18 // n) for m in models for n in (512, 8192) for stack in ('unrolled', 'scan')}
    assert set(compiled) == wanted
    assert len(compiled) == len(wanted) + 1
    assert path.read_text().splitlines()[-8:] == [lines[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
