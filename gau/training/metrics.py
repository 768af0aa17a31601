"""What a run tells while it runs: metrics.jsonl, TensorBoard event files, and a progress bar or plain lines."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from gau.imports import without_pytorch
from gau.training import workdir as files


class MetricsWriter:
    """Appends to DIR/metrics.jsonl, first of all, and to TensorBoard event files in DIR/tensorboard."""

    def __init__(self, workdir: Path, *, first_step: int, keep_evaluations: bool = True):
        """Continues a run at `first_step`: lines that the run will write again are dropped."""
        with without_pytorch():
            from tensorboardX import SummaryWriter

        logging.getLogger('tensorboardX').setLevel(logging.ERROR)
        path = Path(workdir) / files.METRICS
        self.kept = files.truncate_metrics(path, last_step=first_step, keep_evaluations=keep_evaluations)
        self._file = path.open('a')
        self._board = SummaryWriter(str(Path(workdir) / 'tensorboard'), purge_step=first_step + 1, flush_secs=10)

    def write(self, step: int, split: str, metrics: dict[str, Any]) -> None:
        """Writes one line, on disk when this returns (a killed process loses nothing)."""
        self._file.write(json.dumps({'step': step, 'split': split, **metrics}) + '\n')
        self._file.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f'{split}/{name}', value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()


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
