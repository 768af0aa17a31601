"""Runs the points of a sweep on the places of one machine: each a process of train.py, resumed and retried.

Whatever happens to this process, the runs save and end: they get SIGTERM when it is asked to stop, and from the kernel
when it is killed. The same command goes on from there.
"""

import ctypes
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from gau.experiments.devices import Place
from gau.experiments.directory import ROOT, Progress, SweepDirectory, commit
from gau.experiments.sweep import Point, Program

# A point that fails is started so many times in all by one command.
ATTEMPTS = 3
POLL_SECONDS = 0.3
# A signal that comes again within this time is the same one: timeout(1) sends it to the process and to its group.
SAME_SIGNAL_SECONDS = 1.0
TRAIN = ROOT / 'train.py'
# train.py says with it that its config, data or directory are unusable: trying again changes nothing.
BAD_INPUT = 2

WAITING, RUNNING, ELSEWHERE, FINISHED, FAILED = 'waiting', 'running', 'elsewhere', 'finished', 'failed'


@dataclasses.dataclass
class Task:
    """A point on its way.

    Attributes:
      point: what to run.
      state: one of the five above; `elsewhere`: another process trains in its work directory.
      attempts: times it was started by this command.
      place: of the last one.
      error: the last line of the last failure, or ''.
      process: while it runs.
      signals: times it was told to stop.
    """

    point: Point
    state: str = WAITING
    attempts: int = 0
    place: str = ''
    error: str = ''
    process: subprocess.Popen | None = None
    signals: int = 0

    @property
    def name(self) -> str:
        """The point's name."""
        return self.point.name


class Runner:
    """Runs what is not finished."""

    def __init__(
        self,
        program: Program,
        points: Sequence[Point],
        directory: SweepDirectory,
        places: Sequence[Place],
        *,
        tell: Callable[[str], None],
        show: Callable[[Sequence[Task], dict[str, Progress]], None],
    ):
        """Prepares; nothing is started yet.

        Args:
          program: that the points are of.
          points: accepted ones.
          directory: claimed.
          places: each takes one run at a time.
          tell: is given a line when something has happened.
          show: is given all tasks, and how far each is, a few times a second.
        """
        self._program, self._directory = program, directory
        self._tell, self._show = tell, show
        self.tasks = [Task(point) for point in points]
        self._free = deque(places)
        self._running: list[tuple[Task, Place]] = []
        self._progress: dict[str, Progress] = {}
        self._commit = commit()
        self._signals = 0
        self._signalled = 0.0
        self._signum = 0

    def run(self) -> int:
        """Runs all; returns 0 if every point is finished, 1 if not, 128 + signal if one asked to stop."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for task in self.tasks:
                if self._look(task).finished:
                    task.state = FINISHED
            while self._running or (not self._signum and any(self._open(task) for task in self.tasks)):
                self._collect()
                self._pass_on()
                if not self._signum:
                    self._fill()
                for task in self.tasks:
                    if task.state in (RUNNING, ELSEWHERE):
                        self._look(task)
                self._show(self.tasks, self._progress)
                time.sleep(POLL_SECONDS)
            self._show(self.tasks, self._progress)
        finally:
            for task, _ in self._running:
                task.process.terminate()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._signum:
            return 128 + self._signum
        return 0 if all(task.state == FINISHED for task in self.tasks) else 1

    def _open(self, task: Task) -> bool:
        return task.state not in (FINISHED, FAILED)

    def _look(self, task: Task) -> Progress:
        self._progress[task.name] = self._directory.progress(task.name)
        return self._progress[task.name]

    def _fill(self) -> None:
        """Starts what can start."""
        for task in self.tasks:
            if task.state not in (WAITING, ELSEWHERE):
                continue
            if self._directory.is_held(task.name):
                if task.state == WAITING:
                    self._tell(f'{task.name}: another process trains it; looking again when that one ends')
                task.state = ELSEWHERE
                continue
            if task.state == ELSEWHERE and self._look(task).finished:
                self._finish(task)
                continue
            task.state = WAITING
            if self._free:
                self._start(task, self._free.popleft())

    def _start(self, task: Task, place: Place) -> None:
        task.state, task.place, task.attempts = RUNNING, place.name, task.attempts + 1
        workdir = self._directory.workdir(task.name)
        arguments = [*self._program.arguments(task.point.overrides), f'--workdir={workdir}']
        with self._directory.log(task.name).open('a') as log:
            # A session of its own: Ctrl-C comes here alone, and each run gets one SIGTERM from us.
            task.process = subprocess.Popen(
                [sys.executable, str(TRAIN), *arguments],
                env={**os.environ, 'PYTHONUNBUFFERED': '1', **place.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._running.append((task, place))
        command = ' '.join(map(shlex.quote, ('python', 'train.py', *arguments)))
        self._directory.note(task.name, event='start', command=command, commit=self._commit, place=place.name)
        step = self._look(task).step
        self._tell(f'{task.name}: started on {place.name}' + (f', resuming at or before step {step}' if step else ''))

    def _collect(self) -> None:
        """Settles the runs that have ended."""
        for task, place in list(self._running):
            code = task.process.poll()
            if code is None:
                continue
            self._running.remove((task, place))
            self._free.append(place)
            self._directory.note(task.name, event='end', exit_code=code)
            task.process = None
            if code == 0 and self._look(task).finished:
                self._finish(task)
            elif self._signum:
                task.state = WAITING
                self._tell(f'{task.name}: stopped, {self._directory.last_line(task.name)}')
            elif code == BAD_INPUT and self._directory.is_held(task.name):
                # Somebody else was faster.
                task.state, task.attempts = WAITING, task.attempts - 1
            else:
                self._fail(task, code)

    def _finish(self, task: Task) -> None:
        task.state = FINISHED
        loss = self._progress[task.name].loss
        self._tell(f'{task.name}: finished' + (f', loss {loss:.4f}' if loss is not None else ''))

    def _fail(self, task: Task, code: int) -> None:
        how = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
        task.error = f'{how}: {self._directory.last_line(task.name)}'
        again = code != BAD_INPUT and task.attempts < ATTEMPTS
        task.state = WAITING if again else FAILED
        self._tell(f'{task.name}: {task.error}' + (' (starting it again)' if again else ' (given up)'))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signals and now - self._signalled < SAME_SIGNAL_SECONDS:
            return
        self._signals, self._signalled, self._signum = self._signals + 1, now, self._signum or number

    def _pass_on(self) -> None:
        """Tells the runs that a signal came; the second time is for those who cannot wait."""
        told = 0
        for task, _ in self._running:
            if task.signals < self._signals and task.process.poll() is None:
                task.process.send_signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)
                task.signals, told = self._signals, told + 1
        if told:
            again = 'waiting until they have saved; once more kills them' if self._signals == 1 else 'killing them'
            self._tell(f'{signal.Signals(self._signum).name}: {told} runs, {again}')


def _load_prctl() -> Any:
    try:
        return ctypes.CDLL(None).prctl
    except (AttributeError, OSError, TypeError):
        return None


_prctl = _load_prctl()


def _end_with_parent() -> None:
    """In the child: Linux sends SIGTERM when the parent has died, be it by SIGKILL."""
    if _prctl is not None:
        _prctl(1, signal.SIGTERM)
