"""What a training run costs besides its steps: the start, saving, evaluating. Told from when lines of metrics appear.

The loop writes a line as soon as a step has ended (`log.every_steps=1`), so that the clock is outside of the run.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from gau.errors import UserError
from gau.training.workdir import METRICS

# A line is seen this much too late at most, in seconds.
GLANCE = 0.002


class Line(NamedTuple):
    """A line of metrics.jsonl, and when it was there, in seconds since the process was started."""

    seconds: float
    step: int
    split: str


class Costs(NamedTuple):
    """What a run cost, in seconds.

    Attributes:
      start: from the start of the process to the end of the first step.
      step: median of the steps.
      saves: what each checkpoint held the steps up for.
      evaluations: from the end of a step to the end of its evaluation; the first one compiles.
    """

    start: float
    step: float
    saves: list[float]
    evaluations: list[float]


def follow(command: Sequence[str], workdir: Path, *, environment: Mapping[str, str]) -> list[Line]:
    """Runs a training command to its end and returns the lines of the metrics in `workdir`.

    Raises:
      UserError: it failed; the message is the last line that it wrote.
    """
    lines: list[Line] = []
    with tempfile.TemporaryFile('w+') as errors:
        began = time.monotonic()
        process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=errors)
        try:
            with _wait_for(workdir / METRICS, process) as metrics:
                text = ''
                while True:
                    ended = process.poll() is not None
                    text += metrics.read()
                    *whole, text = text.split('\n')
                    now = time.monotonic() - began
                    lines += [Line(now, row['step'], row['split']) for row in map(json.loads, whole)]
                    if ended:
                        break
                    time.sleep(GLANCE)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            raise UserError(f'the run ended with exit code {process.returncode}: {said[-1] if said else "no message"}')
    return lines


def _wait_for(path: Path, process: subprocess.Popen) -> TextIO:
    while not path.is_file() and process.poll() is None:
        time.sleep(GLANCE)
    # A run that fails before it has metrics has none.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.open()


def costs(lines: Sequence[Line], *, save_every: int) -> Costs:
    """Returns the costs that the lines of a run tell, where no step is both saved and evaluated but the last one.

    Args:
      lines: of `follow`.
      save_every: steps between checkpoints.

    Raises:
      UserError: too few steps.
    """
    ends = {line.step: line.seconds for line in lines if line.split == 'train'}
    total = max(ends, default=0)
    evaluated = {line.step: line.seconds for line in lines if line.split != 'train' and line.step < total}
    gaps = {step: ends[step] - ends[step - 1] for step in ends if step - 1 in ends}
    # The step after a pause waits for it, the first two for the compiler.
    plain = [gap for step, gap in gaps.items() if step > 2 and (step - 1) % save_every and step - 1 not in evaluated]
    if len(plain) < 3:
        raise UserError(f'{total} steps with a checkpoint every {save_every} leave none to compare with: want more')
    median = statistics.median(plain)
    return Costs(
        start=ends[1],
        step=median,
        saves=[gaps[step] - median for step in gaps if (step - 1) % save_every == 0],
        evaluations=[seconds - ends[step] for step, seconds in evaluated.items()],
    )
