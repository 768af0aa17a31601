"""Rounds of all scenes, some at once, until the time is over."""

import itertools
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from gau.torture.lab import Lab, Stopped
from gau.torture.scenes import SCENES
from gau.torture.tally import Tally, from_json

DAMAGED = 'damaged files'
# Damaged inputs a scene, all in one process.
_INPUTS = 50
# Seconds that what has begun may take when the time is over.
_GRACE_SECONDS = 90


def run(
    directory: Path,
    *,
    seed: int,
    minutes: float,
    scenes: Sequence[str] | None = None,
    rounds: int | None = None,
    workers: int = 1,
) -> tuple[list[Tally], bool]:
    """Plays rounds of scenes; says on stderr what each brought.

    Scenes that are not finished when the campaign ends are left out, since what they did has not been compared yet;
    unless they have found something.

    Args:
      directory: to work in, which is made.
      seed: of all that is drawn: what is done to whom, and when, as a share of how long an undisturbed program takes.
      minutes: after which no scene begins; a little later those that are not finished are stopped.
      scenes: of NAMES; None means all, the rare ones in every second round.
      rounds: at most; None means as many as there is time for.
      workers: scenes at once.

    Returns:
      A tally for each scene, and whether Ctrl-C ended the campaign.
    """
    begun, lab = time.monotonic(), Lab(directory, seed)
    names = scenes or NAMES
    tallies = {name: Tally(name) for name in names}
    numbers = itertools.count() if rounds is None else range(rounds)
    jobs = ((number, name) for number in numbers for name in names if scenes or name not in _RARE or number % 2 == 0)
    lock, interrupted = threading.Lock(), False

    def play(number: int, name: str) -> None:
        tally = Tally(name)
        try:
            # What is drawn depends on nothing but the seed, whatever runs beside.
            _SCENES[name][0](lab.another(f'{seed} {number} {name}'), tally)
        except Stopped:
            if tally.clean:
                return
        except Exception:
            tally.prints('the campaign itself', traceback.format_exc())
        elapsed = (time.monotonic() - begun) / 60
        with lock:
            tallies[name].add(tally)
            print(*tally.notes, f'{elapsed:5.1f} min  {name}: {tally.faults} faults', sep='\n', file=sys.stderr)

    def work() -> None:
        while time.monotonic() - begun <= 60 * minutes and not lab.stopped:
            with lock:
                number, name = next(jobs, (0, None))
            if name is None:
                return
            play(number, name)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    try:
        # What all compare with is made before they begin.
        for name in names:
            for reference in _SCENES[name][1]:
                getattr(lab, reference)
        print(f'{(time.monotonic() - begun) / 60:5.1f} min  undisturbed results are there', file=sys.stderr)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(begun + 60 * minutes + _GRACE_SECONDS - time.monotonic(), 0))
    except KeyboardInterrupt:
        interrupted = True
    lab.stop()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    return list(tallies.values()), interrupted


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
# What takes long beside what it draws.
_RARE = ('full disk', 'read-only', 'clock', 'two programs')
