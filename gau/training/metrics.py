"""What a run tells while it runs: metrics.jsonl, TensorBoard event files, and a progress bar or plain lines."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from gau import strict_json
from gau.imports import without_pytorch
from gau.training import workdir as files


class MetricsWriter:
    """Appends to DIR/metrics.jsonl, first of all, and to TensorBoard event files in DIR/tensorboard."""

    def __init__(self, workdir: Path, *, first_step: int, keep_evaluations: bool = True):
        """Continues a run at `first_step`: lines that the run will write again are dropped."""
        path = Path(workdir) / files.METRICS
        self.kept = files.truncate_metrics(path, last_step=first_step, keep_evaluations=keep_evaluations)
        self._file = path.open('a')
        self._board = _EventFile(Path(workdir) / 'tensorboard', first_step=first_step)

    def write(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """Writes one line, on disk when this returns (a killed process loses nothing)."""
        self._file.write(strict_json.dumps({'step': step, 'split': split, **metrics}) + '\n')
        self._file.flush()
        scalars = {f'{split}/{name}': x for name, x in metrics.items() if isinstance(x, int | float)}
        self._board.write(step, scalars)

    def close(self) -> None:
        """Closes both files; what could not be written has been said when it was."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


class _EventFile:
    """A TensorBoard event file, written at once.

    tensorboardX's SummaryWriter writes in a thread, which dies of a full disk; then its queue holds the run up for
    good.
    """

    def __init__(self, directory: Path, *, first_step: int, flush_seconds: float = 10.0):
        """Begins a file, in which what earlier ones say of steps after `first_step` is void."""
        with without_pytorch():
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary, self._scalar = event_pb2.Event, summary_pb2.Summary, summary.scalar
        directory.mkdir(exist_ok=True)
        # Two files that begin in the same second must not be one.
        self._writer = EventsWriter(str(directory / 'events'), f'.{os.getpid()}.{first_step}')
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of a step, by their names; on disk after some seconds at most."""
        values = [value for name, x in scalars.items() for value in self._scalar(name, x).value]
        summary = self._summary(value=values)
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > self._flush_seconds:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class MetricsReader:
    """What the other processes have in its place: knows the lines that stay, and writes none."""

    def __init__(self, workdir: Path, *, first_step: int, keep_evaluations: bool = True):
        """Reads what a writer with the same arguments keeps, whether that has come first or not."""
        path = Path(workdir) / files.METRICS
        self.kept = files.kept_metrics(path, last_step=first_step, keep_evaluations=keep_evaluations)

    def write(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """The first process writes the same."""

    def close(self) -> None:
        """Nothing is open."""


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a plain line every few seconds."""

    def __init__(self, total: int, first: int, *, stream: TextIO | None = None, seconds: float = 10.0):
        """Counts from step `first` to `total`; the stream is stderr unless given."""
        stream = sys.stderr if stream is None else stream
        self._stream, self._total, self._seconds = stream, total, seconds
        self._first, self._started, self._spoke = first, time.monotonic(), float('-inf')
        self._bar = None
        if stream.isatty():
            self._bar = tqdm(total=total, initial=first, file=stream, unit='step', dynamic_ncols=True)

    def update(self, step: int, *, loss: float, tokens_per_second: float | None) -> None:
        """Tells of a finished step."""
        speed = f'{tokens_per_second:,.0f} tokens/s' if tokens_per_second else ''
        if self._bar is not None:
            self._bar.set_postfix_str(f'loss {loss:.4f}, {speed}', refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._spoke >= self._seconds or step == self._total:
            self._spoke = now
            left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
            clock = tqdm.format_interval(left)
            self._stream.write(f'step {step}/{self._total}  loss {loss:.4f}  {speed}  {clock} left\n')
            self._stream.flush()

    def say(self, message: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            self._stream.write(message + '\n')
            self._stream.flush()

    def close(self) -> None:
        """Leaves the bar where it stands."""
        if self._bar is not None:
            self._bar.close()
