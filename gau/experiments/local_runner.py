"""Runs the points of a sweep on the places of one machine: each a process of train.py, resumed and retried.

Whatever happens to this process, the runs save and end: they get SIGTERM when it is asked to stop, and from the kernel
when it is killed. The same command goes on from there.
"""

import signal
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from gau.experiments import process
from gau.experiments.devices import Place
from gau.experiments.runner import ELSEWHERE, RUNNING, WAITING, Runner, Task
from gau.training import workdir as files


class LocalRunner(Runner):
    """Runs on this machine."""

    def __init__(self, *arguments: Any, places: Sequence[Place], **shared: Any):
        """Takes what a `Runner` takes, and the places, each for one run at a time."""
        super().__init__(*arguments, **shared)
        self._free = deque(places)
        self._per_device = Counter(place.name for place in places)
        self._places: dict[str, Place] = {}

    def _fill(self) -> None:
        for task in self._queue:
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
        self._places[task.name] = place
        task.handle = process.start(
            *(self._program, task.point, self._directory),
            place=place.name,
            per_device=self._per_device[place.name],
            environment=place.environment,
            commit=self._commit,
        )
        self._started(task)

    def _settle(self) -> None:
        for task in self._running():
            code = task.handle.poll()
            if code is None:
                continue
            task.handle = None
            self._free.append(self._places.pop(task.name))
            self._directory.note(task.name, event='end', exit_code=code)
            if code == 0 and self._look(task).finished:
                self._finish(task)
            elif code > 0 and self._directory.diverged(task.name) is not None:
                self._diverge(task)
            elif self._signum:
                self._interrupted(task)
            elif code == process.BAD_INPUT and self._is_taken(task):
                task.state, task.attempts = ELSEWHERE, task.attempts - 1
            else:
                again = code != process.BAD_INPUT and task.attempts < process.ATTEMPTS
                self._fail(task, process.failure(code, self._directory.last_line(task.name)), again=again)

    def _is_taken(self, task: Task) -> bool:
        """Returns whether another process was faster: it trains there now, or has ended in the meantime."""
        return (
            self._directory.is_held(task.name)
            or self._look(task).finished
            or self._directory.last_line(task.name).endswith(files.TAKEN)
        )

    def _stop(self, task: Task, *, kill: bool) -> None:
        if task.handle.poll() is None:
            task.handle.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
