"""A named table: the sweep, the measurements and the reports that make it, as a config program states them in `TABLES`.

    TABLES = {'branches': Table('Branches of mixed chunk attention', {'small': 'branches,seed:3'}, {'by': ...})}

All of it is data; `scripts/reproduce.py` makes commands of it. Light on purpose (no JAX).
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

BUDGETS = ('tiny', 'small', 'paper')
# A value that may be one for every budget.
ByBudget = str | Mapping[str, str]


class Evaluation(NamedTuple):
    """What eval.py measures of finished runs.

    Attributes:
      flags: of eval.py by name; their values may be by budget.
      points: pattern of the names of the points, without their seeds, as a shell has it.
    """

    flags: Mapping[str, ByBudget]
    points: str = '*'

    def arguments(self, budget: str) -> list[str]:
        """Returns the flags of a budget for a command line."""
        return _arguments(self.flags, budget)


class Page(NamedTuple):
    """Another table of the same runs, at the table's path with a name of its own behind it.

    Attributes:
      title: of the page.
      flags: of scripts/report.py by name; their values may be by budget. With `evaluations` (its value is '') the
        page is of what eval.py measured, else of the ends of training.
      points: patterns of the names of its points, without their seeds; pages of the ends of training have all points.
    """

    title: str
    flags: Mapping[str, ByBudget]
    points: Sequence[str] = ('*',)

    @property
    def measured(self) -> bool:
        """Whether it is of what eval.py measured."""
        return 'evaluations' in self.flags

    def arguments(self, budget: str) -> list[str]:
        """Returns the flags of a budget for a command line, with the title."""
        return [f'--title={self.title}', *_arguments(self.flags, budget)]


class Table(NamedTuple):
    """What `scripts/reproduce.py` runs for a name.

    Attributes:
      title: of the page.
      sweeps: by budget, what `scripts/sweep.py --sweep` takes; `small` stands for a budget that is not there.
      report: flags of `scripts/report.py` by name; their values may be by budget, too.
      words: by budget, what stands behind the colon of `--config=FILE:WORDS`; a budget that is not there the table does
        not have. None: a table of the paper, whose program takes `budget=NAME`, each of BUDGETS.
      fields: by budget, fields of the config that are set over the program's.
      evaluations: what is measured of each finished run, in order.
      ranks: flags of `scripts/attention_ranks.py`, if the ranks of the attention of all runs are measured; else None.
      pages: other tables of the same runs, by what stands behind the path of this one: `bare` for `borders_bare`.
    """

    title: str
    sweeps: Mapping[str, str]
    report: Mapping[str, ByBudget] = {}
    words: Mapping[str, str] | None = None
    fields: Mapping[str, Mapping[str, Any]] = {}
    evaluations: Sequence[Evaluation] = ()
    ranks: Mapping[str, ByBudget] | None = None
    pages: Mapping[str, Page] = {}

    @property
    def budgets(self) -> tuple[str, ...]:
        """Those that the table has, the smallest first."""
        return tuple(budget for budget in BUDGETS if self.words is None or budget in self.words)

    def argument(self, budget: str) -> str:
        """Returns what stands behind the colon of `--config=FILE:ARGUMENT`."""
        return f'budget={budget}' if self.words is None else self.words[budget]

    def sweep(self, budget: str) -> str:
        """Returns the sweep of a budget."""
        return _of_budget(self.sweeps, budget)

    def flags(self, budget: str) -> dict[str, str]:
        """Returns the flags of the report of a budget."""
        return {flag: _of_budget(value, budget) for flag, value in self.report.items()}

    def arguments(self, budget: str) -> list[str]:
        """Returns the same for a command line, with the title."""
        return Page(self.title, self.report).arguments(budget)

    def rank_arguments(self, budget: str) -> list[str]:
        """Returns the flags of `scripts/attention_ranks.py` for a command line."""
        return _arguments(self.ranks or {}, budget)


def find(directory: Path) -> dict[str, tuple[Path, Table]]:
    """Returns the tables of the programs in a directory and the folders in it by name, each with its program's file.

    Raises:
      ValueError: two programs have a table of one name.
    """
    found: dict[str, tuple[Path, Table]] = {}
    for path in _programs(directory):
        for name, table in getattr(_module(path, directory), 'TABLES', {}).items():
            if name in found:
                raise ValueError(f'{path} and {found[name][0]} both have a table "{name}"')
            found[name] = path, table
    return found


def fits(label: str, patterns: Sequence[str]) -> bool:
    """Returns whether the name of a point, without its seed, is meant by one of the patterns."""
    return any(fnmatchcase(label, pattern) for pattern in patterns)


def _programs(directory: Path) -> Iterator[Path]:
    """Yields the files that state tables; the others are not imported, for they need not be programs."""
    for path in sorted(directory.rglob('*.py')):
        if '\nTABLES = ' in path.read_text(encoding='utf-8'):
            yield path


def _module(path: Path, directory: Path) -> ModuleType:
    """Returns the program as a module of its package, whose folder the directory is."""
    parts = path.relative_to(directory.parent).with_suffix('').parts
    return importlib.import_module('.'.join(parts))


def _of_budget(value: ByBudget, budget: str) -> str:
    return value if isinstance(value, str) else value.get(budget, value['small'])


def _arguments(flags: Mapping[str, ByBudget], budget: str) -> list[str]:
    own = {flag: _of_budget(value, budget) for flag, value in flags.items()}
    return [f'--{flag}={value}' if value else f'--{flag}' for flag, value in own.items()]
