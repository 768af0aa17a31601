"""Runs a sweep: every point that is not finished, on every device of this machine.

    python scripts/sweep.py --config=configs/lm.py:runlocal --sweep=model.chunk_size:16:32,seed:3 --workdir=runs/chunks
    python scripts/sweep.py --config=FILE --sweep=NAME,seed --dry_run            what it would run and cost
    python scripts/sweep.py --config=FILE --sweep=NAME --compile_check=v4:2x2x1  whether each point fits
    python scripts/sweep.py --config=FILE --sweep=NAME --workdir=DIR --point=3   one point, for job arrays
    python scripts/sweep.py --config=FILE --sweep=NAME --workdir=DIR --kept=docs/results   what is kept is not run again
    python scripts/sweep.py --config=FILE --sweep=NAME --workdir=DIR --executor=ray   on a Ray cluster

A sweep is a generator `sweep_NAME` of the config program. `seed` is always there, and any field of the config is one,
`FIELD:VALUE:VALUE`, as is any argument of the program, `:NAME:VALUE:VALUE`. A comma takes the product, `+` the union.
Each point is a run of train.py in DIR/POINT with its output in DIR/POINT.log. The same command goes on with what is not
finished, and with --dry_run says what that costs. Ctrl-C stops all runs, saved.

Exit codes: 0 every point is finished; 1 some are not, for the reasons printed; 2 bad usage, in one line; 130 / 143
stopped by SIGINT / SIGTERM.
"""

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import _root  # noqa: F401
from absl import flags
from ml_collections import config_flags

from gau import cli
from gau.errors import UserError
from gau.experiments import plan
from gau.experiments.sweep import Point, Program, find_points

if TYPE_CHECKING:
    from gau.experiments.kept import Matches
    from gau.experiments.runner import Runner

_SWEEP = flags.DEFINE_string('sweep', None, 'Sweeps: "," product, "+" union; NAME:ARGUMENT, FIELD:VALUE:VALUE.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the sweep; each point has its own below it.')
_PER_DEVICE = flags.DEFINE_integer('per_device', 1, 'Runs that share a device and its memory.', lower_bound=1)
_POINT = flags.DEFINE_integer('point', None, 'Run this point alone, by its number from 0 (see --dry_run).')
_KEPT = flags.DEFINE_list(
    'kept', [], 'Files of kept runs, directories of them, sweeps: points that these hold count as finished.'
)
_EXECUTOR = flags.DEFINE_enum(
    'executor', 'local', ['local', 'ray'], 'This machine, or the Ray cluster of RAY_ADDRESS or of this machine.'
)
_DRY_RUN = flags.DEFINE_boolean('dry_run', False, 'Print the points and what they cost; run nothing.')
_CHIP = flags.DEFINE_string('chip', 'H100', 'Chip whose hours --dry_run estimates.')
_UTILISATION = flags.DEFINE_float('utilisation', 0.4, "Share of the chip's peak that is taken to be reached.", 1e-3, 1)
_COMPILE_CHECK = flags.DEFINE_string('compile_check', None, 'Compile each point for this topology; run nothing.')
_VOCAB_SIZE = flags.DEFINE_integer(
    'vocab_size', None, "Vocabulary of --dry_run and --compile_check; default: the tokenizer's.", lower_bound=1
)


def main() -> int:
    """Runs the sweep, or says what it would be."""
    if _SWEEP.value is None:
        raise UserError('--sweep=NAME must be given, for example --sweep=model.chunk_size:64:128,seed:3')
    # Those that say how the sweep would run (--workdir, --per_device, --executor) may stay when --dry_run is added.
    cli.refuse_without('chip', 'utilisation', beside=('dry_run',))
    cli.refuse_without('vocab_size', beside=('dry_run', 'compile_check'))
    if _DRY_RUN.value:
        cli.refuse('compile_check', beside='dry_run', because='it compiles nothing')
    program = _program()
    points = find_points(program, _SWEEP.value)
    if _POINT.value is not None:
        if not 0 <= _POINT.value < len(points):
            raise UserError(f'--point={_POINT.value}: the sweep has points 0 to {len(points) - 1}')
        chosen = points[_POINT.value]
        if chosen.config is None:
            raise UserError(f'--point={_POINT.value} ({chosen.name}) is refused: {chosen.error}')
    accepted = [point for point in points if point.config is not None]
    if not accepted:
        raise UserError(
            f'--sweep={_SWEEP.value}: every point is refused, the first ({points[0].name}) because {points[0].error}'
        )
    matches = _matches(points)
    answers = matches.points if matches else [None] * len(points)
    kept = {point.name: found.path for point, found in zip(points, answers, strict=True) if found}
    print(plan.describe(program, points, kept), flush=True)
    if matches:
        print(matches.told(), flush=True)
    if _DRY_RUN.value:
        how = {'chip': _CHIP.value, 'utilisation': _UTILISATION.value, 'vocab_size': _VOCAB_SIZE.value}
        done = _finished(program, accepted) | dict.fromkeys(kept, 'kept')
        print('\n' + plan.costs(points, **how, done=done, only=_POINT.value))
        return 0
    if _COMPILE_CHECK.value is not None:
        chosen = accepted if _POINT.value is None else [points[_POINT.value]]
        return plan.compile_check(program, chosen, _COMPILE_CHECK.value, vocab_size=_VOCAB_SIZE.value)
    if _WORKDIR.value is None:
        raise UserError('--workdir=DIR must be given')
    return _run(program, points, matches, kept)


def _program() -> Program:
    flag = flags.FLAGS['config']
    path, _, argument = config_flags.get_config_filename(flag).partition(':')
    return Program(path, argument, dict(config_flags.get_override_values(flag)))


def _matches(points: list[Point]) -> 'Matches | None':
    if not _KEPT.value:
        if _KEPT.present:
            raise UserError('--kept= names nothing: leave it out, or say where finished runs are kept')
        return None
    # Imported late: tables of runs bring pandas.
    from gau.experiments import kept

    return kept.match(points, kept.load([Path(path) for path in _KEPT.value]))


def _finished(program: Program, points: list[Point]) -> dict[str, str]:
    """Returns how points are done in the directory, finished or diverged, if one is given."""
    if _WORKDIR.value is None:
        return {}
    from gau.experiments.directory import SweepDirectory

    directory = SweepDirectory(_WORKDIR.value, program, _SWEEP.value, points)
    directory.check()
    done = {point.name: 'diverged' for point in points if directory.diverged(point.name) is not None}
    return done | {point.name: 'finished' for point in points if directory.progress(point.name).finished}


def _run(program: Program, points: list[Point], matches: 'Matches | None', kept: Collection[str]) -> int:
    from gau.experiments.directory import KEPT_RUNS, SweepDirectory
    from gau.experiments.display import Display

    accepted = [point for point in points if point.config is not None]
    directory = SweepDirectory(_WORKDIR.value, program, _SWEEP.value, accepted)
    # What may fail comes before the directory is this sweep's: a wrong path, put right, is no other sweep.
    make, chosen = _runner(), accepted if _POINT.value is None else [points[_POINT.value]]
    weights = plan.weights(chosen)
    directory.claim()
    if matches:
        from gau.experiments.kept import write

        write(points, matches, directory.path / KEPT_RUNS)
    with Display(weights) as display:
        runner = make(program, chosen, directory, tell=display.tell, show=display.show, kept=kept)
        code = runner.run()
    refused = len(points) - len(accepted)
    print(plan.outcome(runner.tasks, refused=refused if _POINT.value is None else 0))
    return code or int(refused > 0 and _POINT.value is None)


def _runner() -> Callable[..., 'Runner']:
    """Returns what makes the runner; raises UserError if there is nowhere to run."""
    if _EXECUTOR.value == 'ray':
        if _POINT.value is not None:
            raise UserError('--point runs here: it does not go with --executor=ray')
        try:
            from gau.experiments.ray_runner import RayRunner
        except ModuleNotFoundError as error:
            raise UserError('--executor=ray needs Ray: pip install -r requirements-ray.txt') from error
        return functools.partial(RayRunner, per_device=_PER_DEVICE.value)
    from gau.experiments.devices import find_places
    from gau.experiments.local_runner import LocalRunner

    return functools.partial(LocalRunner, places=find_places(_PER_DEVICE.value))


if __name__ == '__main__':
    cli.define_config()
    cli.run(main)
