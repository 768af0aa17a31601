"""Makes a table of docs/results from nothing but the data: prepares, sweeps, measures, reports.

    python scripts/reproduce.py branches --budget=tiny              minutes on two CPU cores: shows that it works
    python scripts/reproduce.py branches --budget=small --source='jsonl:wiki/*.jsonl.gz' --per_device=4
    python scripts/reproduce.py branches --budget=paper --dry_run   what it would run and cost
    python scripts/reproduce.py branches --budget=small --kept=docs/results ...   what is kept there is not run again
    python scripts/reproduce.py --missing --budget=small            which runs of all tables are not kept yet
    python scripts/reproduce.py branches --budget=small --kept=DIR,... --only_kept --output=PATH   the table so far

Tables are what the programs in configs/ and configs/paper/ state as their TABLES; their docstrings say what each asks.
What is done is not done again: the same command goes on. The steps are commands of their own and are printed as they
are run. A table is made from nothing, unless --kept says where there are finished runs: those that fit, of whatever
table, are taken, and only the others run. What eval.py and attention_ranks.py measure is of the runs that are here.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError, did_you_mean
from gau.experiments import table as tables
from gau.experiments.job import Job, has_ranks, measured_lines, note
from gau.experiments.sweep import Point
from gau.experiments.table import fits

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'docs' / 'results'
PIECES = 32_000
# The points that are finished here, with their directories.
Runs = Sequence[tuple[Point, Path]]

_BUDGET = flags.DEFINE_enum(
    'budget', 'tiny', list(tables.BUDGETS), 'How much is run: configs/paper/budgets.py; beyond the paper the program.'
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
    found = tables.find(ROOT / 'configs')
    names = sorted(found)
    for name in arguments:
        if name not in found:
            raise UserError(f'there is no table "{name}"{did_you_mean(name, names)}')
        budgets = found[name][1].budgets
        if _BUDGET.value not in budgets:
            raise UserError(
                f'--budget={_BUDGET.value}: {name} is no table of the paper, and has {" and ".join(budgets)}'
            )
    if _KEPT.present and not _KEPT.value:
        raise UserError('--kept= names nothing: leave it out, or say where finished runs are kept')
    cli.refuse_without('chip', 'utilisation', beside=('dry_run', 'missing'))
    if _MISSING.value:
        cli.refuse(
            *('workdir', 'output', 'source', 'tokenizer', 'per_device', 'only_kept', 'dry_run'),
            beside='missing',
            because='it runs nothing, and prints',
        )
        of_budget = [name for name in names if _BUDGET.value in found[name][1].budgets]
        return _missing([Job(name, *found[name], _BUDGET.value) for name in dict.fromkeys(arguments or of_budget)])
    if len(arguments) != 1:
        raise UserError(f'want one table: {", ".join(names)}')
    (name,) = arguments
    job = Job(name, *found[name], _BUDGET.value)
    if _ONLY_KEPT.value:
        cli.refuse(
            *('workdir', 'source', 'tokenizer', 'per_device', 'dry_run'), beside='only_kept', because='it runs nothing'
        )
        return _only_kept(job)
    if job.prepared is None and not job.reads_text:
        cli.refuse('source', 'tokenizer', beside=f'budget={_BUDGET.value}', because=f'its data are {job.source}')
    cli.refuse_without('tokenizer', beside=('source',))
    if job.reads_text and _SOURCE.value and _TOKENIZER.value:
        job.read(_SOURCE.value, _TOKENIZER.value)
    return _dry_run(job) if _DRY_RUN.value else _make(job)


def _make(job: Job) -> int:
    """Runs every step that is not done yet; returns the exit code of the first that fails."""
    _prepare(job)
    workdir = Path(_WORKDIR.value or f'runs/{job.name}_{job.budget}')
    output = _OUTPUT.value or f'{workdir}/report'
    code = _run('scripts/sweep.py', *_sweep(job), f'--workdir={workdir}', f'--per_device={_PER_DEVICE.value}')
    if code:
        return code
    runs = job.finished(workdir)
    for directory, arguments in job.measurements(runs):
        if code := _run('eval.py', f'--workdir={directory}', *arguments):
            return code
        note(directory, arguments)
    if job.table.ranks is not None and runs and (code := _ranks(job, runs, output)):
        return code
    if lines := measured_lines(runs):
        path = Path(output) / 'measured.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines, encoding='utf-8')
    return _report(job, str(workdir), output, runs)


def _sweep(job: Job) -> list[str]:
    return [*job.arguments(), *([f'--kept={",".join(_KEPT.value)}'] if _KEPT.value else [])]


def _ranks(job: Job, runs: Runs, output: str) -> int:
    path = Path(output) / 'ranks.jsonl'
    plot = f'--plot={output}_ranks.png'
    if has_ranks(path, runs):
        return _run('scripts/attention_ranks.py', str(path), plot)
    path.parent.mkdir(parents=True, exist_ok=True)
    directories = [str(directory) for _, directory in runs]
    flags_of_ranks = job.table.rank_arguments(job.budget)
    return _run('scripts/attention_ranks.py', *directories, *flags_of_ranks, f'--json={path}', plot)


def _report(job: Job, where: str, output: str, runs: Runs) -> int:
    """Makes all pages of a table, those of what was measured from the runs that are here."""
    for suffix, page in job.pages():
        paths = [where]
        if page.measured:
            paths = [str(directory) for point, directory in runs if fits(point.label, page.points)]
            if not paths:
                print(f'{output}{suffix} is left out: eval.py measures runs with their checkpoints, and none is here')
                continue
        code = _run('scripts/report.py', *paths, *page.arguments(job.budget), f'--output={output}{suffix}')
        if code:
            return code
    return 0


def _dry_run(job: Job) -> int:
    if not job.is_there and _KEPT.value:
        return _missing([job])
    program = [f'--workdir={_WORKDIR.value or f"runs/{job.name}_{job.budget}"}'] if job.is_there else []
    if not job.is_there:
        # Of the data the cost only knows the vocabulary: that which they would be prepared with.
        job.stand_in()
        program = [f'--vocab_size={PIECES}']
    how = '--dry_run', f'--chip={_CHIP.value}', f'--utilisation={_UTILISATION.value}'
    return _run('scripts/sweep.py', *_sweep(job), *program, *how)


def _missing(jobs: list[Job]) -> int:
    """Prints the runs of tables that are not kept; needs no data."""
    # Imported late: tables of runs bring pandas.
    from gau.experiments import kept, plan

    found = kept.load([Path(path) for path in _KEPT.value] or [RESULTS])
    sources = {job.name: _absent(job) for job in jobs}
    points = {job.name: job.points() for job in jobs}
    missed, matches = kept.missing(points, found, sources=sources)
    absent = any(source is not None for source in sources.values())
    how = {'chip': _CHIP.value, 'utilisation': _UTILISATION.value, 'vocab_size': PIECES if absent else None}
    print(plan.missing(points, missed, **how))
    print(matches.told())
    return 0


def _only_kept(job: Job) -> int:
    """Makes the table of the runs of its points that are kept; needs no data."""
    from gau.experiments import kept

    if not _KEPT.value or not _OUTPUT.value:
        raise UserError('--only_kept needs --kept=FILE|DIR,... and --output=PATH')
    source = _absent(job)
    points = job.points()
    matches = kept.match(points, kept.load([Path(path) for path in _KEPT.value]), source=source)
    print(matches.told(), flush=True)
    if not any(matches.points):
        raise UserError(f'--only_kept: no run of {job.name} is in --kept={",".join(_KEPT.value)}')
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / 'kept.jsonl'
        kept.write(points, matches, path, source=source)
        return _report(job, str(path), _OUTPUT.value, [])


def _absent(job: Job) -> str | None:
    """Returns the source of data that are not here, as `kept.match` takes it; other text stands in for them."""
    from gau.experiments import kept

    if job.is_there:
        return None
    job.stand_in()
    return kept.ANY if job.reads_text else job.source


def _prepare(job: Job) -> None:
    """Prepares the data that the budget reads, unless they are there or need no preparing.

    Raises:
      UserError: they are not, and no text is given.
    """
    if job.is_there:
        return
    if job.reads_text:
        raise UserError(
            f'{job.name} reads text as it is: give it as --source=jsonl:GLOB, with --tokenizer=sentencepiece:FILE'
        )
    if _SOURCE.value is None:
        raise UserError(
            f'--budget={job.budget} reads {job.prepared}, which is not there: give the text to prepare it from, as '
            '--source=jsonl:GLOB, text:GLOB or tfds:NAME'
        )
    tokenizer = f'--tokenizer={_TOKENIZER.value}' if _TOKENIZER.value else f'--train_tokenizer={PIECES}'
    code = _run('scripts/prepare_data.py', f'--source={_SOURCE.value}', tokenizer, f'--output={job.prepared}')
    if code:
        sys.exit(code)


def _run(script: str, *arguments: str) -> int:
    """Runs a program of the repository; Ctrl-C reaches it by itself, and it says in its exit code how it ended."""
    command = (os.path.relpath(ROOT / script), *arguments)
    print('$ python ' + shlex.join(command), flush=True)
    process = subprocess.Popen([sys.executable, *command])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == '__main__':
    cli.run(main, arguments=True)
