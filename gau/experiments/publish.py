"""A report's files: written together, and checked against each other."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gau.errors import UserError
from gau.experiments import figures, page, runs
from gau.experiments.report import Options, Report, frame, kept_paths, make
from gau.experiments.runs import Run
from gau.training.workdir import write_text

SAME = 'as its kept runs give it'


def write(report: Report, found: Sequence[Run], stem: Path) -> str:
    """Writes STEM.md, STEM.jsonl, STEM.csv and STEM_*.png, and returns the table as text.

    Raises:
      UserError: STEM.md is a page of somebody else's.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = kept_paths(stem)
    pictures = figures.draw(report, stem)
    page.write(report, paths['md'], pictures)
    write_text(paths['jsonl'], runs.dump(found, {'report': dataclasses.asdict(report.options)}))
    write_text(paths['csv'], frame(found, report.options).to_csv(index=False))
    written = ', '.join(str(path) for path in (*paths.values(), *pictures))
    return f'{page.table(report)}\n\nwritten: {written}'


def keep(found: Sequence[Run], path: Path) -> str:
    """Writes runs as JSON lines, without a table, for later reports to take; returns what was written.

    Raises:
      UserError: there is no run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, runs.dump(found, {'report': None}))
    return f'{len(found)} finished runs are kept in {path}'


def check(kept: Path) -> str:
    """Returns SAME if the page beside kept JSON lines has the table that they give, else what is wrong.

    Raises:
      UserError: the page or the lines cannot be read.
    """
    report, _ = _made(kept)
    same = page.check(report, kept_paths(kept.with_suffix(''))['md'])
    return SAME if same else 'the table is NOT what the kept runs give: --renew makes it again'


def renew(kept: Path) -> str:
    """Makes the table and figures of kept JSON lines again, as they were asked for then; returns what was done.

    Raises:
      UserError: the page or the lines cannot be read.
    """
    before = check(kept)
    if before != SAME:
        write(*_made(kept), kept.with_suffix(''))
    return before if before == SAME else 'made again'


def _made(kept: Path) -> tuple[Report, list[Run]]:
    found, header = runs.load(kept)
    options = header['report']
    if options is None:
        raise UserError(f'{kept} holds runs without a table: make one with scripts/report.py')
    options = Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
    return make(found, options), found
