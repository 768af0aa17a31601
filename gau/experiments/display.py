"""What a sweep shows while it runs: a table that lives in the terminal, or plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gau.experiments.directory import Progress
from gau.experiments.runner import DIVERGED, ELSEWHERE, FAILED, FINISHED, KEPT, RUNNING, WAITING, Task

_COLOURS = {
    RUNNING: 'cyan',
    FINISHED: 'green',
    KEPT: 'green',
    FAILED: 'red',
    DIVERGED: 'red',
    WAITING: 'dim',
    ELSEWHERE: 'yellow',
}
# What is looked for first stands first when not all fits.
_ORDER = (FAILED, DIVERGED, RUNNING, ELSEWHERE, WAITING, FINISHED, KEPT)
_PLAIN_SECONDS = 60.0
# Lines of the terminal that are not rows of the table.
_FRAME = 8


class Display:
    """The table of a sweep; use as a context."""

    def __init__(self, weights: Mapping[str, float], *, console: Console | None = None):
        """Takes what each point costs, by name, for the time left: FLOPs, or anything in proportion."""
        self.console = console or Console()
        self._weights = weights
        self._live = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=False)
        self._began: tuple[float, float] | None = None
        self._spoke = time.monotonic()

    def __enter__(self) -> 'Display':
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Prints a line, above the table if there is one."""
        self.console.print(Text(f'{time.strftime("%H:%M:%S")} {line}'), soft_wrap=True)

    def show(self, tasks: Sequence[Task], progress: Mapping[str, Progress]) -> None:
        """Draws the table anew; in plain lines, says once a minute how far all is."""
        summary = self._summary(tasks, progress)
        if self._live is not None:
            self._live.update(Group(self._table(tasks, progress), Text(summary)))
        elif time.monotonic() - self._spoke >= _PLAIN_SECONDS:
            self._spoke = time.monotonic()
            self.tell(summary)

    def _summary(self, tasks: Sequence[Task], progress: Mapping[str, Progress]) -> str:
        states = Counter(task.state for task in tasks)
        counts = ', '.join(f'{states[state]} {state}' for state in _ORDER[::-1] if states[state])
        speed = sum(progress[task.name].tokens_per_second or 0 for task in tasks if task.state == RUNNING)
        left = self._seconds_left(tasks, progress)
        parts = [counts, f'{speed:,.0f} tokens/s' if speed else '', f'{_clock(left)} left' if left else '']
        return '   '.join(filter(None, parts))

    def _seconds_left(self, tasks: Sequence[Task], progress: Mapping[str, Progress]) -> float | None:
        """Returns the seconds that the work left takes at the pace since the beginning; None before there is one."""
        done = left = 0.0
        for task in tasks:
            if task.state in (FAILED, DIVERGED):
                continue
            share = 1.0 if task.state in (FINISHED, KEPT) else _share(progress.get(task.name))
            done += share * self._weights[task.name]
            left += (1 - share) * self._weights[task.name]
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        elapsed, work = now - self._began[0], done - self._began[1]
        return left * elapsed / work if work > 0 else None

    def _table(self, tasks: Sequence[Task], progress: Mapping[str, Progress]) -> Table:
        table = Table(box=None, pad_edge=False)
        for head in ('point', 'state', 'on'):
            table.add_column(head, overflow='fold' if head == 'point' else 'ellipsis')
        for head in ('step', 'loss', 'tokens/s'):
            table.add_column(head, justify='right', no_wrap=True)
        room = max(self.console.height - _FRAME, 3)
        shown = set(map(id, sorted(tasks, key=lambda task: _ORDER.index(task.state))[:room]))
        for task in tasks:
            if id(task) not in shown:
                continue
            at = progress.get(task.name, Progress(False, 0, None, None, None))
            state = f'{task.state}, {task.error}' if task.state in (FAILED, DIVERGED) else task.state
            speed = at.tokens_per_second if task.state == RUNNING else None
            table.add_row(
                task.name,
                # One line: the whole of an error is told above the table, and below it when all is done.
                Text(state, style=_COLOURS[task.state], no_wrap=True, overflow='ellipsis'),
                task.place if task.state == RUNNING else '',
                f'{at.step:,}/{at.total:,}' if at.total else f'{at.step:,}',
                '' if at.loss is None else f'{at.loss:.4f}',
                '' if speed is None else f'{speed:,.0f}',
            )
        if len(shown) < len(tasks):
            table.add_row(f'and {len(tasks) - len(shown)} more')
        return table


def _share(progress: Progress | None) -> float:
    if progress is None or not progress.total:
        return 0.0
    return min(progress.step / progress.total, 1.0)


def _clock(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f'{minutes // 60} h {minutes % 60:02} min' if minutes >= 60 else f'{minutes} min {int(seconds) % 60:02} s'
