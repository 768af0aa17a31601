"""Makes a table of the paper's experiments from nothing but the data: prepares, sweeps, reports.

    python scripts/reproduce.py branches --budget=tiny              minutes on two CPU cores: shows that it works
    python scripts/reproduce.py branches --budget=small --source='jsonl:wiki/*.jsonl.gz' --per_device=4
    python scripts/reproduce.py branches --budget=paper --dry_run   what it would run and cost
    python scripts/reproduce.py branches --budget=small --kept=docs/results ...   what is kept there is not run again
    python scripts/reproduce.py --missing --budget=small            which runs of all tables are not kept yet
    python scripts/reproduce.py branches --budget=small --kept=DIR,... --only_kept --output=PATH   the table so far

Tables are the programs in configs/paper, whose docstrings say what each asks. What is done is not done again: the same
command goes on. The steps are commands of their own and are printed as they are run. A table is made from nothing,
unless --kept says where there are finished runs: those that fit, of whatever table, are taken, and only the others run.
"""

import importlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError, did_you_mean
from gau.experiments.sweep import Point, Program, find_points
from gau.experiments.table import Table

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / 'configs' / 'paper'
RESULTS = ROOT / 'docs' / 'results'
PIECES = 32_000

_BUDGET = flags.DEFINE_enum(
    'budget', 'tiny', ['tiny', 'small', 'paper'], 'How much is run, see configs/paper/budgets.py.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the sweep; default: runs/TABLE_BUDGET.')
_OUTPUT = flags.DEFINE_string('output', None, 'Path of the table without ending; default: WORKDIR/report.')
_SOURCE = flags.DEFINE_string('source', None, 'Text to prepare as the data of the budget, if they are not there yet.')
_TOKENIZER = flags.DEFINE_string(
    'tokenizer', None, f'To prepare it with; default: a SentencePiece model of {PIECES:,} pieces, trained.'
)
_PER_DEVICE = flags.DEFINE_integer('per_device', 1, 'Runs that share a device, see scripts/sweep.py.', lower_bound=1)
_KEPT = flags.DEFINE_list('kept', [], 'Where finished runs are kept that need not be made again, see scripts/sweep.py.')
_MISSING = flags.DEFINE_boolean(
    'missing', False, 'Print which runs of the tables given, or of all, are not in --kept (default: docs/results).'
)
_ONLY_KEPT = flags.DEFINE_boolean('only_kept', False, 'Run nothing: make the table of what is in --kept so far.')
_CHIP = flags.DEFINE_string('chip', 'H100', 'Chip whose hours --dry_run and --missing estimate.')
_UTILISATION = flags.DEFINE_float('utilisation', 0.4, "Share of the chip's peak that is taken to be reached.", 1e-3, 1)
_DRY_RUN = flags.DEFINE_boolean('dry_run', False, 'Print the points and what they cost; run nothing.')


def main(arguments: list[str]) -> int:
    """Makes one table, or says what is missing from all."""
    names = sorted({path.stem for path in PROGRAMS.glob('*.py')} - {'__init__', 'budgets'})
    for name in arguments:
        if name not in names:
            raise UserError(f'there is no table "{name}"{did_you_mean(name, names)}')
    if _KEPT.present and not _KEPT.value:
        raise UserError('--kept= names nothing: leave it out, or say where finished runs are kept')
    cli.refuse_without('chip', 'utilisation', beside=('dry_run', 'missing'))
    if _MISSING.value:
        cli.refuse(
            *('workdir', 'output', 'source', 'tokenizer', 'per_device', 'only_kept', 'dry_run'),
            beside='missing',
            because='it runs nothing, and prints',
        )
        return _missing(list(dict.fromkeys(arguments or names)))
    if len(arguments) != 1:
        raise UserError(f'want one table: {", ".join(names)}')
    (name,) = arguments
    module = importlib.import_module(f'configs.paper.{name}')
    table = module.TABLE
    budget = _BUDGET.value
    workdir = _WORKDIR.value or f'runs/{name}_{budget}'
    program = [f'--config={os.path.relpath(PROGRAMS / name)}.py:budget={budget}', f'--sweep={table.sweep(budget)}']
    source = module.get_config(f'budget={budget}').data.source
    if _ONLY_KEPT.value:
        cli.refuse(
            *('workdir', 'source', 'tokenizer', 'per_device', 'dry_run'), beside='only_kept', because='it runs nothing'
        )
        return _only_kept(name)
    if not _is_prepared(source):
        cli.refuse('source', 'tokenizer', beside=f'budget={budget}', because=f'its data are {source}')
    cli.refuse_without('tokenizer', beside=('source',))
    if _KEPT.value:
        program.append(f'--kept={",".join(_KEPT.value)}')
    if _DRY_RUN.value:
        if not _is_there(source):
            if _KEPT.value:
                return _missing([name])
            # Of the data the cost only knows the vocabulary: that which they would be prepared with.
            program[0] += ',data=embedded'
            program.append(f'--vocab_size={PIECES}')
        else:
            program.append(f'--workdir={workdir}')
        return _run('sweep.py', *program, '--dry_run', f'--chip={_CHIP.value}', f'--utilisation={_UTILISATION.value}')
    _prepare(source, budget)
    code = _run('sweep.py', *program, f'--workdir={workdir}', f'--per_device={_PER_DEVICE.value}')
    if code:
        return code
    return _report(table, workdir, _OUTPUT.value or f'{workdir}/report')


def _report(table: Table, runs: str, output: str) -> int:
    report = [f'--{flag}={value}' for flag, value in table.flags(_BUDGET.value).items()]
    return _run('report.py', runs, f'--title={table.title}', f'--output={output}', *report)


def _missing(names: list[str]) -> int:
    """Prints the runs of tables that are not kept; needs no data."""
    # Imported late: tables of runs bring pandas.
    from gau.experiments import kept, plan

    found = kept.load([Path(path) for path in _KEPT.value] or [RESULTS])
    tables, absent = {}, None
    for name in names:
        tables[name], absent = _points(name)
    missed, matches = kept.missing(tables, found, source=absent)
    how = {'chip': _CHIP.value, 'utilisation': _UTILISATION.value, 'vocab_size': PIECES if absent else None}
    print(plan.missing(tables, missed, **how))
    print(matches.told())
    return 0


def _only_kept(name: str) -> int:
    """Makes the table of the runs of its points that are kept; needs no data."""
    from gau.experiments import kept

    if not _KEPT.value or not _OUTPUT.value:
        raise UserError('--only_kept needs --kept=FILE|DIR,... and --output=PATH')
    points, absent = _points(name)
    matches = kept.match(points, kept.load([Path(path) for path in _KEPT.value]), source=absent)
    print(matches.told(), flush=True)
    if not any(matches.points):
        raise UserError(f'--only_kept: no run of {name} is in --kept={",".join(_KEPT.value)}')
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / 'kept.jsonl'
        kept.write(points, matches, path, source=absent)
        return _report(importlib.import_module(f'configs.paper.{name}').TABLE, str(path), _OUTPUT.value)


def _points(name: str) -> tuple[list[Point], str | None]:
    """Returns the points of a table, and the source of their data if it is not here: other text stands in for it."""
    module, budget = importlib.import_module(f'configs.paper.{name}'), _BUDGET.value
    source = module.get_config(f'budget={budget}').data.source
    absent = None if _is_there(source) else source
    program = Program(str(PROGRAMS / f'{name}.py'), f'budget={budget}' + (',data=embedded' if absent else ''))
    return find_points(program, module.TABLE.sweep(budget)), absent


def _prepare(source: str, budget: str) -> None:
    """Prepares the data that the budget reads, unless they are there or need no preparing.

    Raises:
      UserError: they are not, and no text is given.
    """
    if _is_there(source):
        return
    directory = source.partition(':')[2]
    if _SOURCE.value is None:
        raise UserError(
            f'--budget={budget} reads {directory}, which is not there: give the text to prepare it from, as '
            '--source=jsonl:GLOB, text:GLOB or tfds:NAME'
        )
    tokenizer = f'--tokenizer={_TOKENIZER.value}' if _TOKENIZER.value else f'--train_tokenizer={PIECES}'
    code = _run('prepare_data.py', f'--source={_SOURCE.value}', tokenizer, f'--output={directory}')
    if code:
        sys.exit(code)


def _is_there(source: str) -> bool:
    return not _is_prepared(source) or (Path(source.partition(':')[2]) / 'manifest.json').is_file()


def _is_prepared(source: str) -> bool:
    return source.startswith('tokens:')


def _run(script: str, *arguments: str) -> int:
    """Runs a script of this directory; Ctrl-C reaches it by itself, and it says in its exit code how it ended."""
    command = (os.path.relpath(ROOT / 'scripts' / script), *arguments)
    print('$ python ' + shlex.join(command), flush=True)
    process = subprocess.Popen([sys.executable, *command])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == '__main__':
    cli.run(main, arguments=True)
