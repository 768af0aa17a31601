"""Does to the programs what machines and people do, and compares what comes of it with undisturbed runs.

    python scripts/torture.py --minutes=20
    python scripts/torture.py --rounds=1 --scenes='preparing,damaged files' --seed=7

Signals at random moments to training (one process and two), preparing, sweeping, evaluating and sampling; full disks;
what can only be read; a clock that jumps; files cut at random places; two programs in one directory. Small file systems
are mounted where that is allowed, else these scenes are left out. The seed draws what is done to whom, and when.

Prints one table, also of a campaign that is interrupted. Exit codes: 0 no result differs, no work is lost, no program
printed a traceback; 1 otherwise, with a line on stderr for each, and the directory is kept; 2 bad usage; 130
interrupted (by SIGINT or SIGTERM) before anything was found.
"""

import shutil
import signal
import sys
import tempfile
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError, did_you_mean
from gau.torture import campaign, tally

_MINUTES = flags.DEFINE_float(
    'minutes',
    20.0,
    'After so many no further scene begins; those that have begun get a little longer.',
    lower_bound=0.0,
)
_ROUNDS = flags.DEFINE_integer('rounds', None, 'Rounds of all scenes at most.', lower_bound=1)
_WORKERS = flags.DEFINE_integer('workers', 1, 'Scenes at once.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn.', lower_bound=0)
_SCENES = flags.DEFINE_list('scenes', None, f'Which scenes, of: {", ".join(campaign.NAMES)}; by default all.')


def main() -> int:
    """Prints the table; returns the exit code."""
    if _SCENES.value == [] or not _MINUTES.value:
        raise UserError(f'{"--scenes= names none" if _MINUTES.value else "--minutes=0 begins none"}: nothing is tried')
    scenes = _SCENES.value or campaign.NAMES
    for scene in scenes:
        if scene not in campaign.NAMES:
            raise UserError(f'--scenes: unknown "{scene}"{did_you_mean(scene, campaign.NAMES)}')
    directory = Path(tempfile.mkdtemp(prefix='gau_torture_'))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tallies, interrupted = campaign.run(
        directory / 'lab',
        seed=_SEED.value,
        minutes=_MINUTES.value,
        scenes=scenes,
        rounds=_ROUNDS.value,
        workers=_WORKERS.value,
    )
    print(tally.table(tallies), flush=True)
    if all(found.clean for found in tallies):
        shutil.rmtree(directory, ignore_errors=True)
        return 130 if interrupted else 0
    print(f'kept: {directory}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    cli.run(main)
