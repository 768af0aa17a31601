"""What every way to run a sweep has in common: its points on their way, signals, and when all is done."""

import abc
import dataclasses
import signal
import time
from collections.abc import Callable, Collection, Sequence
from types import FrameType
from typing import Any

from gau.experiments.directory import Progress, SweepDirectory
from gau.experiments.sweep import Point, Program
from gau.source import commit
from gau.training import workdir as files

POLL_SECONDS = 0.3
# A signal that comes again within this time is the same one: timeout(1) sends it to the process and to its group.
SAME_SIGNAL_SECONDS = 1.0

WAITING, RUNNING, ELSEWHERE, FINISHED, FAILED = 'waiting', 'running', 'elsewhere', 'finished', 'failed'
# Its loss or gradient became NaN or infinite: it would again.
DIVERGED = 'diverged'
# A finished run of it was there before the sweep (`gau.experiments.kept`).
KEPT = 'kept'


@dataclasses.dataclass
class Task:
    """A point on its way.

    Attributes:
      point: what to run.
      state: one of those above; `elsewhere`: another process trains in its work directory.
      attempts: times it was started by this command.
      place: of the last one.
      error: the last line of the last failure, at which step it diverged, or ''.
      handle: of what runs it, while it runs: a process here, a reference to a Ray task.
      signals: times it was told to stop.
    """

    point: Point
    state: str = WAITING
    attempts: int = 0
    place: str = ''
    error: str = ''
    handle: Any = None
    signals: int = 0

    @property
    def name(self) -> str:
        """The point's name."""
        return self.point.name


class Runner(abc.ABC):
    """Runs what is not finished; subclasses say where."""

    def __init__(
        self,
        program: Program,
        points: Sequence[Point],
        directory: SweepDirectory,
        *,
        tell: Callable[[str], None],
        show: Callable[[Sequence[Task], dict[str, Progress]], None],
        kept: Collection[str] = (),
    ):
        """Prepares; nothing is started yet.

        Args:
          program: that the points are of.
          points: accepted ones.
          directory: claimed.
          tell: is given a line when something has happened.
          show: is given all tasks, and how far each is, a few times a second.
          kept: names of points that have a finished run elsewhere, and are not run.
        """
        self._program, self._directory = program, directory
        self._tell, self._show = tell, show
        self.tasks = [Task(point, KEPT if point.name in kept else WAITING) for point in points]
        # Started seed by seed: a sweep that is stopped has something of every row, and other seeds than the first find
        # what that one has compiled.
        self._queue = sorted(self.tasks, key=lambda task: task.point.config.seed)
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
                elif task.state == WAITING and self._directory.diverged(task.name) is not None:
                    self._diverge(task)
            done = sum(not self._open(task) for task in self.tasks)
            if done:
                self._tell(f'finished before: {done} of {len(self.tasks)} points')
            while self._running() or (not self._signum and any(self._open(task) for task in self.tasks)):
                self._settle()
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
            for task in self._running():
                self._stop(task, kill=False)
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._signum:
            return 128 + self._signum
        return 0 if all(task.state in (FINISHED, KEPT) for task in self.tasks) else 1

    @abc.abstractmethod
    def _fill(self) -> None:
        """Starts what can start."""

    @abc.abstractmethod
    def _settle(self) -> None:
        """Says what has become of the runs that have ended."""

    @abc.abstractmethod
    def _stop(self, task: Task, *, kill: bool) -> None:
        """Tells a task to save and end, or kills it."""

    def _running(self) -> list[Task]:
        return [task for task in self.tasks if task.handle is not None]

    def _open(self, task: Task) -> bool:
        return task.state not in (FINISHED, KEPT, FAILED, DIVERGED)

    def _look(self, task: Task) -> Progress:
        self._progress[task.name] = self._directory.progress(task.name)
        return self._progress[task.name]

    def _started(self, task: Task) -> None:
        step = self._look(task).step
        self._tell(f'{task.name}: started on {task.place}' + (f', resuming at or before step {step}' if step else ''))

    def _finish(self, task: Task) -> None:
        task.state = FINISHED
        loss = self._look(task).loss
        risen = self._directory.risen(task.name)
        before = f' (lowest {risen.lowest:.4f} at step {risen.step:,})' if risen else ''
        self._tell(f'{task.name}: finished' + (f', loss {loss:.4f}{before}' if loss is not None else ''))

    def _interrupted(self, task: Task) -> None:
        task.state = WAITING
        self._tell(f'{task.name}: stopped, {self._directory.last_line(task.name)}')

    def _fail(self, task: Task, error: str, *, again: bool) -> None:
        task.error, task.state = error, WAITING if again else FAILED
        self._tell(f'{task.name}: {error}' + (' (starting it again)' if again else ' (given up)'))

    def _diverge(self, task: Task) -> None:
        task.state, task.error = DIVERGED, f'at step {self._directory.diverged(task.name):,}'
        self._tell(
            f'{task.name}: diverged {task.error}; not started again as long as '
            f'{self._directory.workdir(task.name) / files.DIVERGED} is there'
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signals and now - self._signalled < SAME_SIGNAL_SECONDS:
            return
        self._signals, self._signalled, self._signum = self._signals + 1, now, self._signum or number

    def _pass_on(self) -> None:
        """Tells the runs that a signal came; the second time is for those who cannot wait."""
        untold = [task for task in self._running() if task.signals < self._signals]
        for task in untold:
            self._stop(task, kill=self._signals > 1)
            task.signals = self._signals
        running = sum(task.state == RUNNING for task in untold)
        if running:
            again = 'waiting until they have saved; once more kills them' if self._signals == 1 else 'killing them'
            self._tell(f'{signal.Signals(self._signum).name}: {running} run{"s" * (running > 1)}, {again}')
