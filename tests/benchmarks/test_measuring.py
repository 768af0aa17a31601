"""The clock, the batches, and the processes that measure."""

import types

import jax
import numpy as np
import pytest

from gau.benchmarks import decoding, processes, timing, training
from gau.benchmarks.cells import Cell, Spec
from gau.errors import UserError
from tests.models import tiny

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


def test_steps_of_many_seconds_are_few(monkeypatch):
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: float(next(now)))
    # The clock is read three times a sample.
    times = timing.time_steps(lambda: None, lambda step: None, effort='full')
    assert len(times.seconds) == timing.FEWEST


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
    with processes.Workers(processes.environment(tmp_path), log=tmp_path / 'rows.log') as workers:
        return workers.measure(cell)


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


@pytest.mark.slow
def test_a_training_step_in_segments_begins_as_that_of_whole_rows():
    found = []
    for spec in (Spec('flash'), Spec('flash', segment_tokens=8)):
        result = {}
        training.measure_train(Cell('train', spec, **TINY), result)
        found.append([result['first_loss'], result['first_grad_norm']])
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.slow
def test_writing_and_reading_measured_in_this_process():
    measures = {'decode': decoding.measure_decode, 'prefill': decoding.measure_prefill}
    state_bytes = set()
    for kind, tokens in (('decode', 2 * decoding.STEPS['quick']), ('prefill', 2 * 32)):
        result = {}
        measures[kind](Cell(kind, Spec('flash'), **TINY), result)
        assert (len(result['seconds']), result['tokens']) == (decoding.SAMPLES['quick'][0], tokens)
        assert min(result['seconds']) > 0
        state_bytes.add(result['state_bytes'])
    assert len(state_bytes) == 1


def test_bytes_that_a_step_cannot_do_without():
    for name, state in (
        # Two layers: sums of 4 x 16; keys and values of the 1 + ... + 5 tokens of a chunk, three on average.
        ('flash', 2 * (4 * 16 + 3 * (4 + 16))),
        # Keys and values of 21 to 25 tokens.
        ('flash_quad', 2 * 23 * (4 + 16)),
    ):
        model, params = tiny.make(name, dtype='bfloat16', context=32)
        params = jax.tree.map(lambda x: x.astype('float32'), params)
        found = decoding.bytes_per_step(model, params, batch_size=3, first=20, steps=5)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert found == 4 * numbers + 3 * 2 * state


def test_a_state_that_does_not_fit_is_told_with_its_size(monkeypatch):
    small = types.SimpleNamespace(platform='cpu', memory_stats=lambda: {'bytes_limit': 2**30})
    monkeypatch.setattr(jax, 'devices', lambda: [small])
    cell, result = Cell('decode', Spec('transformer_plus_plus'), **TINY | {'context': 2**19}), {}
    with pytest.raises(UserError, match='out of memory: 3 GiB of state'):
        decoding.measure_decode(cell, result)
    assert result['state_bytes'] > 2**30
