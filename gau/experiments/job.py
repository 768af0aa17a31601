"""A table of one budget: what its commands say, which data it reads, and what of its runs is to be measured."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gau import strict_json
from gau.experiments import table as tables
from gau.experiments.sweep import Point, Program, find_points
from gau.experiments.table import Page, Table
from gau.training import workdir as files

# In the directory of a run: a line for each time eval.py measured what a table asks for, with its flags.
MEASURED = 'reproduced.txt'
# Kinds of sources that are read as they are. `tokens:DIR` is prepared, and what is drawn or embedded is always there.
_TEXT = ('jsonl', 'text')


class Job:
    """A table of a budget.

    Attributes:
      name, table, budget: which.
      program: the config program, with the fields that the table sets.
      sweep: as `scripts/sweep.py --sweep` takes it.
      source: the `data.source` of its runs.
      is_there: whether the data are here: prepared, or told by `read`, or of a kind that always is.
    """

    def __init__(self, name: str, path: Path, table: Table, budget: str):
        """Takes a table of a program (see `tables.find`) and one of its budgets."""
        self.name, self.table, self.budget = name, table, budget
        self.program = Program(os.path.relpath(path), table.argument(budget), dict(table.fields.get(budget, {})))
        self.sweep = table.sweep(budget)
        # A point whose data are not here is refused, but says what they would be.
        first = find_points(self.program, self.sweep)[0]
        self.source = self.program.open_config(first.overrides).data.source
        self.is_there = not self.reads_text and (
            self.prepared is None or (Path(self.prepared) / 'manifest.json').is_file()
        )

    @property
    def prepared(self) -> str | None:
        """Returns the directory of prepared tokens that the runs read, or None."""
        kind, _, directory = self.source.partition(':')
        return directory if kind == 'tokens' else None

    @property
    def reads_text(self) -> bool:
        """Whether the runs read text that nobody prepares."""
        return self.source.partition(':')[0] in _TEXT

    def read(self, source: str, tokenizer: str) -> None:
        """Sets the text that the runs read, and with what."""
        self._set(source=source, tokenizer=tokenizer)
        self.source, self.is_there = source, True

    def stand_in(self) -> None:
        """Puts text that is always here in the place of prepared tokens that are not: these decide no other field."""
        if self.prepared is not None and not self.is_there:
            self._set(source='embedded')

    def _set(self, **fields: str) -> None:
        own = {f'data.{name}': value for name, value in fields.items()}
        self.program = Program(self.program.path, self.program.argument, {**self.program.overrides, **own})

    def points(self) -> list[Point]:
        """Returns the points of the sweep."""
        return find_points(self.program, self.sweep)

    def arguments(self) -> list[str]:
        """Returns what `scripts/sweep.py` is told of the points."""
        return [*self.program.arguments({}), f'--sweep={self.sweep}']

    def finished(self, workdir: Path) -> list[tuple[Point, Path]]:
        """Returns the points whose runs are in the directory of the sweep, and not kept elsewhere, with their own."""
        found = [(point, workdir / point.name) for point in self.points()]
        return [(point, directory) for point, directory in found if files.read_final(directory) is not None]

    def measurements(self, runs: Sequence[tuple[Point, Path]]) -> Iterator[tuple[Path, list[str]]]:
        """Yields the directories of runs and the flags of eval.py that are still to be run there."""
        for point, directory in runs:
            for evaluation in self.table.evaluations:
                arguments = evaluation.arguments(self.budget)
                if tables.fits(point.label, [evaluation.points]) and ' '.join(arguments) not in _measured(directory):
                    yield directory, arguments

    def pages(self) -> Iterator[tuple[str, Page]]:
        """Yields the table's own page and the others, with what stands behind the path of each."""
        yield '', Page(self.table.title, self.table.report)
        yield from ((f'_{name}', page) for name, page in self.table.pages.items())


def note(directory: Path, arguments: Sequence[str]) -> None:
    """Notes in the directory of a run that eval.py has measured it with these flags."""
    with (directory / MEASURED).open('a', encoding='utf-8') as file:
        file.write(' '.join(arguments) + '\n')


def measured_lines(runs: Sequence[tuple[Point, Path]]) -> str:
    """Returns as JSON lines all that eval.py has measured of runs, each line with the name of its run."""
    rows = ((directory.name, row) for _, directory in runs for row in files.read_metrics(directory / files.EVAL))
    return ''.join(strict_json.dumps({'run': name, **row}) + '\n' for name, row in rows)


def has_ranks(path: Path, runs: Sequence[tuple[Point, Path]]) -> bool:
    """Returns whether a file of `scripts/attention_ranks.py --json` is of these runs and no others, at their ends."""
    wanted = {(directory.name, files.read_final(directory)['step']) for _, directory in runs}
    try:
        lines = [strict_json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        return {(line['workdir'], line['step']) for line in lines} == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _measured(directory: Path) -> list[str]:
    path = directory / MEASURED
    return path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
