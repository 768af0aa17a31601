"""The clock, the batches, and the processes that measure."""

import numpy as np

from gau.benchmarks import processes, timing, training
from gau.benchmarks.cells import Cell, Spec

TINY = {'size': 'tiny', 'context': 32, 'batch_size': 2, 'vocab_size': 50, 'dtype': 'float32', 'effort': 'quick'}


def test_one_step_is_always_in_flight():
    launched, waited = [], []

    def launch():
        launched.append(len(waited))
        return len(launched)

    times = timing.time_steps(launch, waited.append, effort='quick')
    samples = timing.SAMPLES['quick'][0]
    assert waited == list(range(1, timing.WARMUP + samples + 1))
    # When a step is launched, all but the last one were waited for.
    assert launched == [0, *range(timing.WARMUP + samples - 1)]
    assert len(times.seconds) == len(times.launch_seconds) == samples >= 10


def test_packed_batches_hold_documents_end_to_end():
    cell = Cell('train', Spec('flash'), **TINY | {'context': 4096, 'packed': True})
    batch = training.random_batch(cell, seed=1)
    ids, positions = batch['segment_ids'], batch['positions']
    assert batch['inputs'].max() < 50
    assert (ids[:, 0] == 1).all()
    begins = np.diff(ids, axis=1)
    assert set(np.unique(begins)) == {0, 1}
    assert (positions[:, 1:] == np.where(begins, 0, positions[:, :-1] + 1)).all()
    assert 'segment_ids' not in training.random_batch(Cell('train', Spec('flash'), **TINY), seed=1)


def test_masked_batches_score_a_share_of_their_tokens():
    batch = training.random_batch(Cell('train', Spec('flash'), **TINY | {'context': 4096, 'objective': 'mlm'}), seed=1)
    assert abs(batch['weights'].mean() - training.MASK_RATE) < 0.02


def run(cell, tmp_path):
    return processes.run_cell(cell, environment=processes.environment(tmp_path), log=tmp_path / 'rows.log')


def test_a_cell_in_a_process_of_its_own(tmp_path):
    result = run(Cell('matmul', Spec('matmul'), **TINY), tmp_path)
    assert result['flops'] == 2 * 32**3
    assert min(result['seconds']) > 0
    assert result['device'] == 'cpu'


def test_refused_settings_and_crashes_are_rows(tmp_path, monkeypatch):
    result = run(Cell('train', Spec('combiner', 'xla'), **TINY), tmp_path)
    assert 'impl=xla does not exist for combiner' in result['error']
    assert not (tmp_path / 'rows.log').exists()
    assert run(Cell('nonsense', Spec('flash'), **TINY), tmp_path)['error'] == "crashed: KeyError: 'nonsense'"
    assert 'Traceback' in (tmp_path / 'rows.log').read_text()
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\nkill -SEGV $$\n')
    python.chmod(0o755)
    monkeypatch.setattr(processes.sys, 'executable', str(python))
    assert run(Cell('train', Spec('flash'), **TINY), tmp_path) == {'error': 'crashed: SIGSEGV'}


def test_a_forward_pass_measured_in_this_process():
    result = {}
    training.measure_forward(Cell('forward', Spec('flash'), **TINY), result)
    assert len(result['seconds']) >= 10
    assert abs(result['loss'] - np.log(50)) < 0.5
    assert result['tokens'] == 64
    assert result['compiler_bytes'] > 4 * result['parameters']
