"""Rounds of all scenes, some at once, until the time is over."""

import itertools
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gau.torture.lab import Lab
from gau.torture.scenes import SCENES
from gau.torture.tally import Tally, from_json

DAMAGED = 'damaged files'
# Damaged inputs a round, all in one process.
_INPUTS = 40


def run(
    directory: Path,
    *,
    seed: int,
    minutes: float,
    scenes: Sequence[str] | None = None,
    rounds: int | None = None,
    workers: int = 1,
) -> list[Tally]:
    """Plays rounds of scenes; says on stderr what each brought.

    Args:
      directory: to work in, which is made.
      seed: of all that is drawn: what is done to whom, and when, as a share of how long an undisturbed program takes.
      minutes: after which no scene begins.
      scenes: of NAMES; None means all.
      rounds: at most; None means as many as there is time for.
      workers: scenes at once.

    Returns:
      A tally for each scene.
    """
    begun, lab = time.monotonic(), Lab(directory, seed)
    chosen = {name: _SCENES[name] for name in scenes or NAMES}
    tallies = {name: Tally(name) for name in chosen}
    # What all compare with is made before they begin.
    for _, references in chosen.values():
        for reference in references:
            getattr(lab, reference)

    jobs = ((number, name) for number in (itertools.count() if rounds is None else range(rounds)) for name in chosen)
    lock = threading.Lock()

    def work() -> None:
        while time.monotonic() - begun <= 60 * minutes:
            with lock:
                number, name = next(jobs, (0, None))
            if name is None:
                return
            tally = Tally(name)
            play, _ = chosen[name]
            # What is drawn depends on nothing but the seed, whatever runs beside.
            play(lab.another(f'{seed} {number} {name}'), tally)
            elapsed = (time.monotonic() - begun) / 60
            with lock:
                tallies[name].add(tally)
                print(*tally.notes, f'{elapsed:5.1f} min  {name}: {tally.faults} faults', sep='\n', file=sys.stderr)

    with ThreadPoolExecutor(workers) as pool:
        for worker in [pool.submit(work) for _ in range(workers)]:
            worker.result()
    return list(tallies.values())


def _damage(lab: Lab, tally: Tally) -> None:
    """Has a process of its own try damaged inputs; one that it dies of counts as a traceback."""
    seed = lab.rng.randrange(2**31)
    done = lab.run(['-m', 'gau.torture.damage', str(lab.directory), str(seed), str(_INPUTS)])
    lines = done.out.splitlines()
    for line in lines:
        tally.add(from_json(line))
    if done.code != 0:
        tally.faults += 1
        tally.tracebacks += 1
        tally.notes.append(f'{DAMAGED}: input {len(lines) + 1} of seed {seed} ended it: {done.err[-1500:]}')


_SCENES = {**SCENES, DAMAGED: (_damage, ('tokens', 'trained'))}
NAMES = tuple(_SCENES)
