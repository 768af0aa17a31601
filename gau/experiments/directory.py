"""The directory of a sweep: which sweep it holds, and how far each of its points is.

DIR/sweep.json      the command and, for each point, its overrides and resolved config
DIR/attempts.jsonl  a line for each time that a point was started: command, commit, device, how it ended
DIR/POINT/          the work directory of a run (see gau.training.workdir)
DIR/POINT.log       what it printed
DIR/kept.jsonl      finished runs from elsewhere that count as points (see gau.experiments.kept)
"""

import fcntl
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gau import strict_json
from gau.errors import UserError
from gau.experiments.cost import total_steps
from gau.experiments.sweep import Point, Program
from gau.training import lowest
from gau.training import workdir as files
from gau.training.config import differences

SWEEP = 'sweep.json'
ATTEMPTS = 'attempts.jsonl'
KEPT_RUNS = 'kept.jsonl'
# Of a metrics file only the end is read: it grows while it is looked at.
_TAIL_BYTES = 2**16
ROOT = Path(__file__).resolve().parents[2]


class Progress(NamedTuple):
    """How far a point is, by its own files.

    Attributes:
      finished: whether it has its final result.
      step, total: steps done and to do; total is None where only the data know.
      loss: of the last logged step, or held out when finished; None before the first.
      tokens_per_second: of the last logged step.
    """

    finished: bool
    step: int
    total: int | None
    loss: float | None
    tokens_per_second: float | None


class SweepDirectory:
    """The directory of one sweep; other processes may be working on other points of it."""

    def __init__(self, path: str | Path, program: Program, expression: str, points: Sequence[Point]):
        """Takes the directory for a sweep; nothing is written before `claim`."""
        self.path, self._program, self._expression = Path(path), program, expression
        self._points = {point.name: point for point in points if point.config is not None}

    def workdir(self, name: str) -> Path:
        """Returns the work directory of a point."""
        return self.path / name

    def log(self, name: str) -> Path:
        """Returns the file that has what the point's runs printed."""
        return self.path / f'{name}.log'

    def check(self) -> dict[str, Any]:
        """Returns the points that the directory holds. A sweep may grow; nothing of it may change.

        Raises:
          UserError: it holds another sweep, something else, or a point with another config.
        """
        stored = self._stored()
        for name, known in stored.items():
            if name not in self._points:
                raise UserError(
                    f'--workdir={self.path} is the directory of another sweep: its point {name} is not in this one'
                )
            self._check_same(known['config'], name, 'is the directory of another sweep')
        for name in self._points:
            if (self.workdir(name) / files.CONFIG).exists():
                config = files.config_to_dict(files.read_config(self.workdir(name)))
                self._check_same(config, name, 'holds a run with another config')
        return stored

    def claim(self) -> None:
        """Makes the directory this sweep's, or finds that it is.

        Raises:
          UserError: see `check`, or it cannot be written.
        """
        stored = self.check()
        points = {
            name: {
                'overrides': point.overrides,
                'label': point.label,
                'config': files.config_to_dict(point.config),
            }
            for name, point in self._points.items()
        }
        if stored.keys() != points.keys():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                tree = {'command': self._program.arguments({}), 'sweep': self._expression, 'points': points}
                files.write_json(self.path / SWEEP, tree)
            except OSError as error:
                raise UserError(f'--workdir={self.path} cannot be written: {error.strerror}') from error

    def progress(self, name: str) -> Progress:
        """Returns how far a point is."""
        total = total_steps(self._points[name].config)
        workdir = self.workdir(name)
        row = next((row for row in _last_rows(workdir / files.METRICS) if row['split'] == 'train'), {})
        speed = row.get('tokens_per_second')
        final = files.read_final(workdir)
        if final is None:
            return Progress(False, row.get('step', 0), total, row.get('loss'), speed)
        losses = [metrics['loss'] for metrics in final['eval'].values() if metrics.get('loss') is not None]
        return Progress(True, final['step'], final['step'], losses[0] if losses else row.get('loss'), speed)

    def risen(self, name: str) -> lowest.Risen | None:
        """Returns when the loss that `progress` has of a finished point was lowest, if it is worse at the end."""
        final = files.read_final(self.workdir(name)) or {'eval': {}}
        shown = next((split for split, metrics in final['eval'].items() if metrics.get('loss') is not None), None)
        risen = lowest.risen(files.read_metrics(self.workdir(name) / files.METRICS))
        return next((found for found in risen if found.split == shown), None)

    def diverged(self, name: str) -> int | None:
        """Returns the step at which a point diverged; None if it did not. The same command would do so again."""
        return files.read_diverged(self.workdir(name))

    def is_held(self, name: str) -> bool:
        """Returns whether some process trains in the point's work directory right now."""
        try:
            lock = open(self.workdir(name) / files.LOCK)  # noqa: SIM115  closed below
        except OSError:
            return False
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def last_line(self, name: str) -> str:
        """Returns the last line that the point printed."""
        try:
            lines = [line for line in _tail(self.log(name)).splitlines() if line.strip()]
        except OSError:
            return 'nothing was printed'
        return lines[-1].strip() if lines else 'nothing was printed'

    def starts(self) -> list[dict[str, Any]]:
        """See `read_starts`."""
        return read_starts(self.path)

    def note(self, name: str, **fields: Any) -> None:
        """Appends a line to attempts.jsonl."""
        line = json.dumps({'point': name, 'time': round(time.time(), 3), **fields})
        # One write of one short line: processes that append at once do not mix their lines.
        with (self.path / ATTEMPTS).open('a') as file:
            file.write(line + '\n')

    def _stored(self) -> dict[str, Any]:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f'--workdir={self.path} is not a directory')
        path = self.path / SWEEP
        if not path.is_file():
            if self.path.is_dir() and any(not entry.name.startswith('.') for entry in self.path.iterdir()):
                raise UserError(f'--workdir={self.path} is not empty and holds no sweep ({SWEEP} is missing)')
            return {}
        return read_points(self.path)

    def _check_same(self, stored: dict[str, Any], name: str, complaint: str) -> None:
        old = files.config_to_dict(files.whole_config(stored))
        changed = differences(old, files.config_to_dict(self._points[name].config))
        if changed:
            raise UserError(f'--workdir={self.path} {complaint} (point {name}: {"; ".join(changed)})')


def read_points(sweep: Path) -> dict[str, Any]:
    """Returns what a sweep's directory says of its points, by name: overrides, label, config.

    Raises:
      UserError: it cannot be read.
    """
    path = sweep / SWEEP
    try:
        return dict(files.read_json(path)['points'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error


def read_starts(sweep: Path) -> list[dict[str, Any]]:
    """Returns the lines of a sweep's attempts.jsonl that are starts, oldest first; what cannot be read is left out."""
    path, lines = sweep / ATTEMPTS, []
    for text in path.read_text(errors='backslashreplace').splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and line.get('event') == 'start']


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the last lines of a metrics file, newest first."""
    rows = []
    try:
        lines = _tail(path).splitlines()
    except OSError:
        return []
    for line in reversed(lines):
        try:
            rows.append(strict_json.loads(line))
        except ValueError:
            # Cut at the front, or just being written.
            continue
    return rows


def _tail(path: Path) -> str:
    with path.open('rb') as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        return file.read().decode(errors='replace')
