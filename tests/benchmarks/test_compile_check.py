"""compile_check on simulated devices; TPUs only where their compiler is installed."""

import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from gau.benchmarks import chips, compile_check
from gau.errors import UserError
from gau.training.config import default_config, resolve
from gau.training.mesh import make_mesh
from tests.programs import call
from tests.training.test_commands import run

TINY = ['--config=configs/lm.py:runlocal', '--vocab_size=512', '--config.model.num_layers=2']
TINY += ['--config.model.model_dim=64', '--config.model.query_key_dim=16']
has_libtpu = importlib.util.find_spec('libtpu') is not None


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v4', 'want CHIP:AxB'),
        ('v9:4x4', 'unknown chip "v9"'),
        ('cpu:2x2', 'want CHIP:AxB'),
        ('v5e:4x4x4', 'numbered in AxB$'),
    ],
)
def test_unknown_topologies_are_one_line(name, message):
    with pytest.raises(UserError, match=message):
        chips.target(name)


@pytest.mark.slow
def test_the_step_is_compiled_for_simulated_devices(tmp_path):
    output = tmp_path / 'row.jsonl'
    mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=-1']
    code, out, err = run('scripts/compile_check.py', *TINY, *mesh, '--topology=cpu:4', f'--json={output}')
    assert code == 0, err
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert row['mesh'] == {'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 1}
    assert row['fits'] is None
    # 86 k parameters and two moments in float32, half of them on each device, and little else.
    assert 0.5 < row['argument_bytes'] / (3 * 4 * 86_000) < 0.6
    assert row['temporary_bytes'] > 0
    assert row['flops'] > row['model_flops'] > 0
    assert row['collectives']['all-gather']['bytes'] > 0
    assert 'data 2 x fsdp 2' in out
    code, out, err = run('scripts/compile_check.py', *TINY, *mesh, '--topology=cpu:4', '--shardings')
    assert code == 0, err
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert "| embedding/kernel | (512, 64) | float32 | 32,768 | ('tensor', 'fsdp') |" in lines, out
    # Rows lie over data and fsdp, four devices.
    assert any(line.startswith('residual stream float32[4,128,64] [1,128,64] ') for line in lines), out
    few = ['--topology=cpu:4', '--config.mesh.data=4', '--config.data.batch_size=2']
    code, _, err = run('scripts/compile_check.py', *TINY, *few)
    assert (code, err.count('\n')) == (2, 1)
    assert err.endswith(': mesh.sequence=2 with mesh.data=2 or data.batch_size=4 would\n')


@pytest.mark.parametrize(('data', 'said'), [
    (1, 'warning: the mesh uses 1 of 4 devices; --config.mesh.data=-1 asks for all of them\n'),
    (-1, ''),
])  # fmt: skip
def test_devices_that_the_mesh_leaves_are_told(data, said):
    arguments = [*TINY, f'--config.mesh.data={data}', '--topology=cpu:4', '--shardings']
    code, _, err = run('scripts/compile_check.py', *arguments)
    assert (code, err) == (0, said)


@pytest.mark.parametrize(('batch', 'context', 'mesh', 'accumulation', 'expected'), [
    (32, 8192, {'data': 64}, 1, ['mesh.sequence=2 with mesh.data=32', 'data.batch_size=64']),
    (32, 8192, {'data': -1}, 1, ['mesh.sequence=2', 'data.batch_size=64']),
    # A chunk of 256 on two devices would be none.
    (32, 256, {'data': -1}, 1, ['data.batch_size=64']),
    (48, 1024, {'data': 8, 'fsdp': 4}, 2, ['mesh.sequence=4 with mesh.data=2', 'data.batch_size=64']),
    (4, 300, {'data': 4, 'sequence': 2}, 1, ['data.context=512']),
    # Both are wrong.
    (3, 300, {'data': 4, 'sequence': 2}, 1, []),
])  # fmt: skip
def test_what_would_fit_where_a_batch_does_not(batch, context, mesh, accumulation, expected):
    config = default_config()
    config.model.name, config.optimizer.accumulation_steps = 'flash', accumulation
    config.data.update({'batch_size': batch, 'context': context})
    config.mesh.update({'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | mesh)
    shape = {axis: 64 if size == -1 else size for axis, size in config.mesh.items()}
    assert compile_check.what_fits(compile_check.without_data(config), shape) == expected


@pytest.mark.parametrize(('batch', 'mesh', 'fields', 'expected'), [
    (8, {'data': 4}, {}, ['model.remat=full', 'optimizer.accumulation_steps=2', 'optimizer.sharding=data',
                          'mesh.fsdp=2 with mesh.data=2']),
    (4, {'data': 2, 'fsdp': 2}, {'sharding': 'data'}, ['model.remat=full', 'mesh.fsdp=4 with mesh.data=1']),
    (12, {'data': 1}, {'accumulation_steps': 2}, ['model.remat=full', 'optimizer.accumulation_steps=3']),
    (4, {'data': 4}, {'name': 'muon'}, ['model.remat=full', 'mesh.fsdp=2 with mesh.data=2']),
])  # fmt: skip
def test_what_holds_less_where_a_step_does_not_fit(batch, mesh, fields, expected):
    config = default_config()
    config.data.batch_size = batch
    mesh = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | mesh
    config.mesh.update(mesh)
    config.optimizer.update(fields)
    config = resolve(config)
    assert compile_check.what_saves_memory(config, mesh) == expected


@pytest.mark.slow
def test_the_gradient_of_the_embedding_is_summed_over_devices_once(tmp_path):
    """And not for every slice of the vocabulary loss, sixteen of them here."""
    output = tmp_path / 'row.jsonl'
    arguments = ['--config.mesh.data=4', '--config.model.vocab_loss_slice=8', '--topology=cpu:4', f'--json={output}']
    code, _, err = run('scripts/compile_check.py', *TINY, *arguments)
    assert code == 0, err
    row = json.loads(output.read_text())
    # 86 k parameters in float32 and once more 33 k of the embedding: as input and as output it has a gradient each.
    assert 1 <= row['collectives']['all-reduce']['bytes'] / (4 * (86_000 + 32_768)) < 1.05


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--table=TMP/table.md', '--sweep=batch'], '--sweep does nothing with --table'),
        (['--table=TMP/table.md', *TINY], '--config does nothing with --table'),
        (['--topology=cpu:1', *TINY, '--json=TMP'], 'cannot be written: Is a directory'),
    ],
)
def test_what_would_do_nothing_is_refused_before_anything_is_compiled(tmp_path, arguments, message):
    arguments = [argument.replace('TMP', str(tmp_path)) for argument in arguments]
    code, out, err = call('scripts/compile_check.py', *arguments)
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert message in err


@pytest.mark.skipif(has_libtpu, reason='the TPU compiler is installed')
def test_a_missing_compiler_is_one_line():
    code, out, err = call('scripts/compile_check.py', *TINY, '--topology=v4:2x2x1')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'pip install libtpu' in err


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu, reason='needs libtpu')
def test_a_tpu_step_and_the_largest_batch(tmp_path):
    output = tmp_path / 'rows.jsonl'
    large = ['--config.data.batch_size=1024', '--config.data.context=2048', '--config.model.layer_stack=scan']
    tpu = ['--topology=v5e:2x2', '--config.mesh.data=-1']
    code, out, err = run('scripts/compile_check.py', *TINY, *large, *tpu, f'--json={output}', '--sweep=batch')
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    largest = int(out.split()[-1])
    assert max(row['batch_size'] for row in rows if row['fits']) == largest
    smallest_too_large = min(row['batch_size'] for row in rows if not row['fits'])
    assert largest < smallest_too_large <= largest * 1.1 + 4
    assert all(0 < row['mfu'] <= row['mfu_bound'] < 1 for row in rows if row['fits'])


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu, reason='needs libtpu')
def test_an_axis_of_the_mesh_may_be_half_of_a_physical_one():
    target = chips.target('v4:4x4x4')
    mesh = make_mesh(ConfigDict({'data': 32, 'fsdp': 1, 'tensor': 1, 'sequence': 2}), target.devices)
    assert mesh.devices.shape == (32, 1, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['lm', 'mlm'])
def test_nothing_of_the_length_of_a_text_is_gathered_by_flash(objective):
    def compiled(devices, context):
        arguments = ['-m', 'tests.benchmarks.sequence_program', objective, str(devices), str(context)]
        code, out, err = run(*arguments)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    context = 8192
    spread, alone = compiled(8, context), compiled(1, context)
    assert spread['collectives']
    for shape in spread['shapes']:
        # The narrowest array of all tokens has S = 16 numbers for each.
        assert context not in shape
        assert math.prod(shape) < context * 16, shape
    # What a device keeps is its part of the tokens: no [N, N] and no copy of the text.
    assert spread['temporary_bytes'] < alone['temporary_bytes'] / 5


@pytest.mark.parametrize(('start', 'limit'), [(4, 148), (512, 148), (64, 2), (4, 1000)])
def test_a_sweep_doubles_and_halves(monkeypatch, start, limit):
    tried = []

    def check(config, target, *, vocab_size):
        tried.append(config.data.batch_size)
        return compile_check.Check({'fits': config.data.batch_size <= limit}, [], [])

    monkeypatch.setattr(compile_check, 'check', check)
    config = default_config()
    config.data.batch_size = start
    target = chips.Target('somewhere', [], None, 2**30, None)
    shape = {'data': 1, 'fsdp': 4, 'tensor': 1, 'sequence': 1}
    monkeypatch.setattr(compile_check.meshes, 'make_mesh', lambda *_: SimpleNamespace(shape=shape))
    largest = compile_check.sweep(config, 'batch', target, vocab_size=1, report=lambda row: None)
    if limit < 4:
        assert largest is None
    else:
        assert limit * (1 - compile_check.SWEEP_RESOLUTION) <= largest[0] <= limit
    assert len(tried) == len(set(tried)) <= 14
    assert all(size % 4 == 0 for size in tried)
