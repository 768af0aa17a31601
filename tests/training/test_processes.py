"""Several processes compute what one process with as many devices does, and end together whatever happens."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from gau.errors import UserError
from gau.training import distributed, lost_process, workdir
from tests.training.processes import (
    TINY,
    assert_done,
    finish,
    mesh,
    run,
    start_processes,
    train_with,
    wait_for_step,
)
from tests.training.tiny import read_metrics, read_state

SLOW = pytest.mark.slow
LONG = '--config.steps=4000'


def assert_same_run(path, other) -> None:
    """Metrics and parameters within float32's rounding of sums in another order; the same data, exactly."""
    rows, others = read_metrics(path), read_metrics(other)
    assert [(row['step'], row['split'], row['tokens']) for row in rows] == [
        (row['step'], row['split'], row['tokens']) for row in others
    ]
    for row, expected in zip(rows, others, strict=True):
        for name, value in expected.items():
            if isinstance(value, float):
                assert row[name] == pytest.approx(value, rel=1e-4 if 'perplexity' in name else 1e-5), (row, expected)
    for left, right in zip(
        jax.tree.leaves(read_state(path).params), jax.tree.leaves(read_state(other).params), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=2e-5)
    step = rows[-1]['step']
    assert data_state(path, step) == data_state(other, step)


def data_state(path, step):
    return json.loads((path / 'checkpoints' / str(step) / 'data' / 'metadata').read_text())


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run of one process with four devices, its data in two streams."""
    path = tmp_path_factory.mktemp('processes') / 'alone'
    arguments = [*TINY, '--config.data.streams=2', *mesh(data=2, fsdp=2)]
    assert_done(run('train.py', *arguments, f'--workdir={path}', devices=4))
    return path, arguments


@pytest.mark.parametrize(('name', 'process', 'code'), [('SIGTERM', 1, 143), pytest.param('SIGINT', 0, 130, marks=SLOW)])
def test_a_signal_to_one_process_saves_on_all_and_one_process_goes_on(alone, tmp_path, name, process, code):
    path, arguments = alone
    arguments = [*arguments, f'--workdir={tmp_path / "run"}']
    program = train_with(f'signal.raise_signal(signal.{name})', process=process, step=3)
    (first, _, err), (second, _, quiet) = run(*program, *arguments, devices=2, count=2)
    assert (first, second) == (code, code), err + quiet
    # Asked at step 3, known to all at step 4.
    assert f'{name}: saved at step 4' in err
    assert 'Traceback' not in err + quiet
    shardings = (path / 'shardings.txt').read_text()
    assert 'residual stream' in shardings
    assert (tmp_path / 'run' / 'shardings.txt').read_text() == shardings
    assert_done(run('train.py', *arguments, devices=4))
    assert_same_run(tmp_path / 'run', path)


@SLOW
@pytest.mark.parametrize(
    ('shape', 'streams'),
    [
        ({'data': 4}, 2),
        ({'fsdp': 4}, 4),
        ({'tensor': 2, 'data': 2}, 1),
        # Here both processes hold parts of all rows.
        ({'tensor': 4}, 1),
        ({'sequence': 4}, 2),
    ],
)
def test_two_processes_equal_one_on_any_mesh(tmp_path, shape, streams):
    # Sixteen tokens of 64 a device, if they are spread: whole chunks.
    arguments = [*TINY, *mesh(**shape), f'--config.data.streams={streams}', '--config.model.chunk_size=16']
    assert_done(run('train.py', *arguments, f'--workdir={tmp_path / "alone"}', devices=4))
    results = run('train.py', *arguments, f'--workdir={tmp_path / "two"}', devices=2, count=2)
    assert_done(results)
    assert_same_run(tmp_path / 'two', tmp_path / 'alone')
    # The second process writes and says nothing.
    assert results[1][2] == ''
    final = workdir.read_json(tmp_path / 'two' / 'final.json')
    assert final['eval']['valid']['loss'] == read_metrics(tmp_path / 'two')[-1]['loss']
    assert final['device'] == '4 x cpu'


@SLOW
def test_more_and_fewer_processes_and_devices_go_on_with_the_same_run(alone, tmp_path):
    path, arguments = alone
    shutil.copytree(path, tmp_path / 'run')
    checkpoints = tmp_path / 'run' / 'checkpoints'
    shutil.rmtree(checkpoints / '10')
    # From step 5 two processes, whose checkpoint of step 10 four open, and then a single device.
    for count, shape in ((2, {'fsdp': 2}), (4, {'data': 2, 'tensor': 2}), (1, {})):
        shutil.rmtree(checkpoints / '12')
        (tmp_path / 'run' / 'final.json').unlink()
        results = run('train.py', *arguments, *mesh(**shape), f'--workdir={tmp_path / "run"}', count=count)
        assert_done(results)
        assert f'resumed at step {5 if count == 2 else 10}' in results[0][2]
        assert_same_run(tmp_path / 'run', path)


@SLOW
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_frozen_process_does_not_leave_the_other_hanging(tmp_path, victim, signum):
    arguments = [*TINY, LONG, *mesh(data=2), f'--workdir={tmp_path / "run"}']
    started = start_processes('train.py', *arguments, '--heartbeat_seconds=20', devices=1)
    wait_for_step(tmp_path / 'run', 6, started)
    started[victim].send_signal(signum)
    ((code, _, err),) = finish([started[1 - victim]], timeout=600)
    started[victim].kill()
    started[victim].communicate()
    last = err.splitlines()[-1]
    assert (code, 'Traceback' in err, 'thread 0x' in err) == (1, False, False), err
    assert last.startswith('error: another process of this run has died or cannot be reached'), err
    assert last.endswith(f'run: {workdir.what_is_safe(tmp_path / "run")}; the same commands go on'), err


@SLOW
def test_an_error_in_one_process_ends_both(tmp_path):
    program = train_with('raise OSError("the disk is full")', process=0, step=3)
    arguments = [*TINY, *mesh(data=2), f'--workdir={tmp_path / "run"}']
    results = run(*program, *arguments, devices=1, count=2)
    assert 'the disk is full' in results[0][2]
    assert [code for code, _, _ in results] == [1, 1]
    assert results[1][2].splitlines()[-1].startswith('error: another process of this run has died'), results[1][2]


@SLOW
def test_what_one_process_refuses_all_refuse_in_one_line(alone, tmp_path):
    path, _ = alone
    mine, yours = ([f'--workdir={tmp_path / name}'] for name in ('mine', 'yours'))
    for both, own, hint in (
        ([*mesh(data=2), *mine], {1: ['--config.seed=1']}, 'config: process 1 of 2 has another than process 0'),
        (mesh(data=2), {0: mine, 1: yours}, 'must lie on a file system that all processes share'),
        ([*mesh(data=2), f'--workdir={path}', '--config.seed=1'], None, 'seed: 0 -> 1'),
        ([*mesh(data=1), *mine], None, 'must multiply to the 2 device(s)'),
        ([*mesh(data=2), *mine, f'--fork={tmp_path / "nothing"}'], None, 'holds no run'),
    ):
        results = run('train.py', *TINY, *both, devices=1, count=2, own=own)
        for code, _, err in results:
            assert (code, err.count('\n')) == (2, 1), err
            assert hint in err
    assert not (tmp_path / 'yours').exists()


@SLOW
@pytest.mark.parametrize('damaged', ['state', 'state/ocdbt.process_1', 'data'])
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path, damaged):
    arguments = [*TINY, *mesh(fsdp=2), f'--workdir={tmp_path / "run"}']
    assert_done(run('train.py', *arguments, devices=1, count=2))
    shutil.copytree(tmp_path / 'run', tmp_path / 'straight')
    (tmp_path / 'run' / 'final.json').unlink()
    files = [file for file in (tmp_path / 'run' / 'checkpoints' / '12' / damaged).rglob('*') if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    results = run('train.py', *arguments, devices=1, count=2)
    assert_done(results)
    assert 'checkpoints/12 is damaged' in results[0][2]
    assert results[0][2].count('warning') == 1
    assert 'resumed at step 10' in results[0][2]
    assert (tmp_path / 'run' / 'damaged_checkpoints' / '12').is_dir()
    assert_same_run(tmp_path / 'run', tmp_path / 'straight')


@SLOW
def test_evaluation_on_any_number_of_processes_and_devices(alone, tmp_path):
    path, _ = alone
    shutil.copytree(path, tmp_path / 'run')
    for devices, count in ((1, 1), (4, 1), (2, 2)):
        arguments = ['eval.py', f'--workdir={tmp_path / "run"}', '--max_tokens=500', '--contexts=64,128']
        results = run(*arguments, devices=devices, count=count)
        assert_done(results)
        assert 'bits per byte' in results[0][1]
        assert all('bits per byte' not in out for _, out, _ in results[1:])
    rows = workdir.read_metrics(tmp_path / 'run' / 'eval.jsonl')
    assert len(rows) == 6
    for row in rows:
        assert row['loss'] == pytest.approx(rows[row['context'] // 64 - 1]['loss'], rel=1e-5)
    results = run(*arguments, '--evaluators=whole_documents', devices=1, count=2)
    assert [code for code, _, _ in results] == [2, 2]
    assert '--distributed=off' in results[0][2]


@pytest.mark.parametrize(
    ('error', 'lost'),
    [
        (ValueError('UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer\nmore'), True),
        (jax.errors.JaxRuntimeError('INTERNAL: NCCL operation ncclAllReduce failed: remote process exited'), True),
        (jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out. Id: shutdown'), True),
        (OSError('the disk is full'), False),
        (KeyError('gloo'), False),
    ],
)
def test_a_lost_process_is_one_line_with_what_is_safe(error, lost, monkeypatch):
    def fail():
        with lost_process.told('start again'), lost_process.told(lambda: 'step 5 is safe'):
            try:
                raise error
            except type(error) as cause:
                raise RuntimeError('what Orbax makes of it') from cause

    with pytest.raises(RuntimeError, match='what Orbax makes of it'):
        fail()
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(lost_process.LostProcess if lost else RuntimeError) as caught:
        fail()
    if lost:
        assert str(caught.value).endswith(f'({str(error).splitlines()[0]}); step 5 is safe')


def test_an_abort_of_the_runtime_is_one_line(tmp_path):
    program = (
        'import ctypes, threading, time\n'
        'from gau.training import lost_process\n'
        'abort = threading.Thread(target=ctypes.CDLL(None).abort)\n'
        'with lost_process.one_line_at_abort(), lost_process.told("step 5 is safe"):\n'
        '    abort.start()\n'
        '    time.sleep(60)\n'
    )
    ((code, out, err),) = run('-c', program)
    assert (code, out, err.count('\n')) == (1, '', 1)
    assert err.startswith('error: another process of this run has died or cannot be reached')
    assert err.endswith('; step 5 is safe\n')


def processes(**changed):
    given = {'coordinator_address': None, 'num_processes': None, 'process_id': None}
    return distributed.processes(**{**given, 'detect': True, 'heartbeat_seconds': 100, **changed})


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'num_processes': 2, 'process_id': 0}, 'give --coordinator_address, too'),
        ({'coordinator_address': 'host:1'}, 'give --num_processes, too'),
        ({'coordinator_address': 'host', 'num_processes': 2, 'process_id': 0}, 'must be HOST:PORT'),
        ({'coordinator_address': 'host:1', 'num_processes': 2, 'process_id': 2}, r'must lie in 0..1'),
        ({'coordinator_address': 'host:1', 'num_processes': 2, 'process_id': 0, 'detect': False}, 'does not go with'),
        ({'heartbeat_seconds': 0}, 'heartbeat_seconds=0'),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(given, message):
    with pytest.raises(UserError, match=message), processes(**given):
        pass


CLUSTERS = {
    'slurm': {'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_NTASKS': '2'},
    'open mpi': {'OMPI_COMM_WORLD_SIZE': '4'},
    'kubernetes': {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'},
    'tpu': {'TPU_WORKER_HOSTNAMES': 'a,b'},
}
NO_CLUSTERS = {
    'nothing': {},
    'a slurm step of one task': {'SLURM_STEP_NODELIST': 'n1', 'SLURM_NTASKS': '1'},
    'a shell in a slurm allocation': {'SLURM_NTASKS': '8'},
    'one mpi process': {'OMPI_COMM_WORLD_SIZE': '1'},
    'a pod that is no indexed job': {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
    'one tpu host': {'TPU_WORKER_HOSTNAMES': 'localhost'},
}


@pytest.mark.parametrize('name', [*CLUSTERS, *NO_CLUSTERS])
def test_clusters_are_recognised_without_asking_anyone(name, monkeypatch):
    for variable in {key for environment in CLUSTERS.values() for key in environment} | {'TPU_PROCESS_ADDRESSES'}:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {**CLUSTERS, **NO_CLUSTERS}[name].items():
        monkeypatch.setenv(variable, value)
    asked = []
    monkeypatch.setattr(distributed, '_join', lambda *args, **kwargs: asked.append(kwargs) is not None)
    with processes():
        assert asked == ([{}] if name in CLUSTERS else [])
    asked.clear()
    with processes(detect=False), processes(coordinator_address='host:1', num_processes=1, process_id=0):
        assert not asked
