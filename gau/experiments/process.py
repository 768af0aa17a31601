"""A run of a point: a process of train.py that saves and ends when whoever started it says so, or dies."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gau.experiments.directory import ROOT, SweepDirectory
from gau.experiments.sweep import Point, Program

# A point that fails is started so many times in all by one command.
ATTEMPTS = 3
TRAIN = ROOT / 'train.py'
# train.py says with it that its config, data or directory are unusable: trying again changes nothing.
BAD_INPUT = 2


def start(
    program: Program,
    point: Point,
    directory: SweepDirectory,
    *,
    place: str,
    per_device: int,
    environment: Mapping[str, str],
    commit: str | None,
    train: Path | None = None,
) -> subprocess.Popen:
    """Starts the run of a point, or goes on with it, and notes the start in the directory.

    Args:
      program: that the point is of.
      point: an accepted one.
      directory: claimed.
      place: where it runs, as people call it.
      per_device: how many runs share that place's device, at most.
      environment: what it needs besides this process's.
      commit: of the repository.
      train: the program to run; by default TRAIN.
    """
    arguments = [*program.arguments(point.overrides), f'--workdir={directory.workdir(point.name)}']
    with directory.log(point.name).open('a') as log:
        # A session of its own: Ctrl-C comes to the sweep alone, and each run gets one SIGTERM from that.
        process = subprocess.Popen(
            [sys.executable, str(train or TRAIN), *arguments],
            env={**os.environ, 'PYTHONUNBUFFERED': '1', **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    command = ' '.join(map(shlex.quote, ('python', 'train.py', *arguments)))
    directory.note(point.name, event='start', command=command, commit=commit, place=place, per_device=per_device)
    return process


def failure(code: int, last_line: str) -> str:
    """Returns how a run failed, in a line, from its exit code and the last line that it printed."""
    how = f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'
    return f'{how}: {last_line}'


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
