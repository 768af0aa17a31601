"""Trains a few steps of a config, twice, and says what a run costs besides its steps: start, checkpoints, evaluation.

    python scripts/benchmark_run.py --config=configs/lm.py:size=base,context=8192 --config.eval.max_tokens=200000

The first run has an empty compilation cache, the second that of the first. Each is `train.py` in a process of its own,
in a work directory that is deleted. How many steps there are, and when a run logs, saves and evaluates, is for this
program's flags to say, all else for the config.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import _root  # noqa: F401
from absl import flags
from ml_collections import config_flags

from gau import cli
from gau.benchmarks import run_costs
from gau.errors import UserError

cli.define_config()
_STEPS = flags.DEFINE_integer('steps', 60, 'Training steps of each run.', lower_bound=12)
_SAVE = flags.DEFINE_integer('save_every', 25, 'Steps between checkpoints.', lower_bound=2)
_EVALUATE = flags.DEFINE_integer('eval_every', 20, 'Steps between evaluations.', lower_bound=2)


# What a run of this program has instead of the config's.
_OWN = ('steps', 'tokens', 'epochs', 'log.every_', 'checkpoint.every_', 'eval.every_')


def main() -> None:
    """Prints a table with a column for each run, then a line of JSON."""
    cli.load_config()
    both = [step for step in range(1, _STEPS.value) if step % _SAVE.value == 0 and step % _EVALUATE.value == 0]
    if both:
        raise UserError(f'step {both[0]} is both saved and evaluated: want another --save_every or --eval_every')
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    for field in overrides:
        if field.startswith(_OWN):
            raise UserError(f'--config.{field} is for --steps, --save_every and --eval_every to decide')
    own = {
        'steps': _STEPS.value,
        'log.every_steps': 1,
        'checkpoint.every_steps': _SAVE.value,
        'eval.every_steps': _EVALUATE.value,
    }
    if not any(field.startswith('optimizer.warmup_') for field in overrides):
        # The config's own may be longer than so short a run.
        own['optimizer.warmup_percent'] = 10
    # As an exception it ends the run, too.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    given = _config_arguments(sys.argv[1:])
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {'GAU_COMPILATION_CACHE': f'{directory}/cache'}
        environment.pop('JAX_COMPILATION_CACHE_DIR', None)
        for cache in ('empty', 'filled'):
            workdir = Path(directory) / cache
            command = [sys.executable, str(Path(__file__).parents[1] / 'train.py'), *given, f'--workdir={workdir}']
            command += [f'--config.{field}={value}' for field, value in own.items()]
            lines = run_costs.follow(command, workdir, environment=environment)
            found[cache] = run_costs.costs(lines, save_every=_SAVE.value)
    print(f'{"compilation cache":44}{"empty":>12}{"filled":>12}')
    rows = {
        's from the start to the end of the first step': lambda run: f'{run.start:.1f}',
        'ms a step, median': lambda run: f'{1000 * run.step:.1f}',
        'ms that a checkpoint adds, median': lambda run: _median(run.saves, 1000),
        's of the first evaluation': lambda run: f'{run.evaluations[0]:.2f}' if run.evaluations else '-',
        's of the later ones, median': lambda run: _median(run.evaluations[1:], 1),
    }
    for name, show in rows.items():
        print(f'{name:48}' + f'{show(found["empty"]):>8}{show(found["filled"]):>12}')
    print(json.dumps({cache: run._asdict() for cache, run in found.items()}))


def _median(seconds: list[float], factor: int) -> str:
    return f'{factor * statistics.median(seconds):.{1 if factor > 1 else 2}f}' if seconds else '-'


def _config_arguments(arguments: list[str]) -> list[str]:
    """Returns those arguments that speak of the config, as they were given."""
    taken, follows = [], False
    for argument in arguments:
        name = argument.lstrip('-')
        about_config = argument.startswith('-') and name.split('=')[0].split('.')[0] == 'config'
        if about_config or follows:
            taken.append(argument)
        follows = about_config and '=' not in argument
    return taken


if __name__ == '__main__':
    cli.run(main)
