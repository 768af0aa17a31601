"""What a sweep shows while it runs, in a terminal and elsewhere."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from gau.experiments import display
from gau.experiments.directory import Progress
from gau.experiments.runner import FAILED, FINISHED, RUNNING, WAITING, Task
from gau.experiments.sweep import Point

STATES = {'a': FINISHED, 'b': RUNNING, 'c': WAITING, 'd': FAILED}


@pytest.fixture
def clock(monkeypatch):
    """Yields the time that the display reads, in seconds, as the only entry of a list."""
    now = [0.0]
    monkeypatch.setattr(display, 'time', SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime))
    return now


def shown(clock, *, terminal, error='exit code 1: RuntimeError: x'):
    """Returns the lines shown of four runs of 100 steps, of which one is at step 50 after a minute."""
    tasks = [Task(Point(name, {}, name, None), state=state) for name, state in STATES.items()]
    tasks[1].place, tasks[3].error = 'gpu 0', error
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, height=20)
    with display.Display(dict.fromkeys(STATES, 1.0), console=console) as board:
        board.tell('b: started on gpu 0')
        for clock[0], step in ((0.0, 0), (60.0, 50)):
            progress = {name: Progress(False, 0, 100, None, None) for name in STATES}
            progress['a'] = Progress(True, 100, 100, 3.25, 900.0)
            progress['b'] = Progress(False, step, 100, 3.5, 1200.0)
            board.show(tasks, progress)
    return [' '.join(line.split()) for line in Text.from_ansi(file.getvalue()).plain.splitlines()]


def test_in_a_terminal_it_is_a_table(clock):
    lines = shown(clock, terminal=True)
    assert 'point state on step loss tokens/s' in lines
    assert 'a finished 100/100 3.2500' in lines
    assert 'b running gpu 0 50/100 3.5000 1,200' in lines
    assert 'c waiting 0/100' in lines
    assert 'd failed, exit code 1: RuntimeError: x 0/100' in lines
    # Half a run took a minute; one and a half are left.
    assert '1 finished, 1 waiting, 1 running, 1 failed 1,200 tokens/s 3 min 00 s left' in lines


def test_a_run_is_a_line_of_the_table_whatever_it_failed_with(clock):
    lines = shown(clock, terminal=True, error='exit code 1: loss is not finite in ' + 'blocks_0/gau/out/kernel, ' * 9)
    table = lines[-6:]
    assert [line.split()[0] for line in table] == ['point', 'a', 'b', 'c', 'd', '1']
    assert table[4].startswith('d failed, exit code 1: loss is not finite in blocks_0')
    assert table[4].endswith('… 0/100')


def test_elsewhere_it_is_a_line_a_minute(clock):
    started, summary = shown(clock, terminal=False)
    assert started.endswith('b: started on gpu 0')
    assert summary.endswith('1 finished, 1 waiting, 1 running, 1 failed 1,200 tokens/s 3 min 00 s left')
