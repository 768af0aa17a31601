"""A process that cannot load a batch tells the others in time."""

import pytest

from gau.errors import UserError
from gau.training.ahead import Ahead
from gau.training.interruption import NO_BATCH, Interruption
from gau.training.mesh import make_mesh
from tests.data.conftest import make_texts, write_jsonl
from tests.training.processes import TINY, finish, mesh, start_processes
from tests.training.tiny import read_metrics, tiny_config


class Counting:
    """Batches 1, 2, ... of which the one after `last` cannot be loaded."""

    rows, rows_read, batch_size = (0,), 1, 2

    def __init__(self, last):
        self.count, self.last = 0, last

    def __next__(self):
        if self.count == self.last:
            raise UserError(f'batch {self.last + 1} is bad')
        self.count += 1
        return {'number': self.count}

    def get_state(self):
        return {'0': self.count}


def interruption(monkeypatch):
    from gau.training import interruption as module

    monkeypatch.setattr(module.jax, 'process_count', lambda: 2)
    return Interruption(make_mesh(tiny_config().mesh))


@pytest.mark.parametrize('last', [2, 3, 5])
def test_the_last_step_is_that_before_the_missing_batch_and_the_state_is_of_that_step(monkeypatch, last):
    ahead, stop, step = Ahead(Counting(last)), interruption(monkeypatch), 0
    assert ahead.load(10) == (last > 1)
    stop.poll()
    # As in the loop.
    while not stop:
        assert next(ahead)['number'] == step + 1
        step += 1
        if not ahead.load(10 - step):
            stop.no_batch()
        stop.poll()
    assert (step, stop.signum, str(ahead.error)) == (last, NO_BATCH, f'batch {last + 1} is bad')
    assert ahead.get_state() == {'0': last}


def test_what_lies_beyond_the_end_of_the_run_is_not_asked_for():
    ahead = Ahead(Counting(3))
    for step in range(3):
        assert ahead.load(3 - step)
        next(ahead)
    assert ahead.error is None


@pytest.mark.slow
def test_all_processes_save_the_same_step_and_leave(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(60, longest=4))
    lines = path.read_text('utf-8').splitlines()
    lines[43] = '{"text": null}'
    path.write_text('\n'.join(lines), 'utf-8')
    arguments = [
        *(*TINY, *mesh(data=2), '--config.steps=20', '--config.data.streams=2', '--config.data.shuffle=none'),
        *('--config.eval.every_steps=20', '--config.checkpoint.every_steps=20', '--config.data.packing=document'),
        f'--config.data.source=jsonl:{path}',
    ]

    def both(workdir, bad_lines):
        given = [*arguments, f'--workdir={tmp_path / workdir}', f'--config.data.bad_lines={bad_lines}']
        return finish(start_processes('train.py', *given, devices=1))

    for _ in range(2):
        results = both('run', 'error')
        for code, _, err in results:
            assert code == 2, err
            assert 'a.jsonl:44' in err
            assert 'data.bad_lines="skip"' in err
            assert 'saved at step' in err
            assert 'Traceback' not in err
    for workdir in ('run', 'undisturbed'):
        assert [code for code, _, _ in both(workdir, 'skip')] == [0, 0]
    assert read_metrics(tmp_path / 'run') == read_metrics(tmp_path / 'undisturbed')
