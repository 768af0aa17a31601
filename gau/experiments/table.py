"""A named table: the sweep and the report that make it, stated by a config program as its `TABLE`."""

from collections.abc import Mapping
from typing import NamedTuple


class Table(NamedTuple):
    """What `scripts/reproduce.py` runs for a config program.

    Attributes:
      title: of the page.
      sweeps: by budget, what `scripts/sweep.py --sweep` takes; `small` stands for a budget that is not there.
      report: flags of `scripts/report.py` by name; their values may be by budget, too.
    """

    title: str
    sweeps: Mapping[str, str]
    report: Mapping[str, str | Mapping[str, str]] = {}

    def sweep(self, budget: str) -> str:
        """Returns the sweep of a budget."""
        return _of_budget(self.sweeps, budget)

    def flags(self, budget: str) -> dict[str, str]:
        """Returns the flags of the report of a budget."""
        return {flag: _of_budget(value, budget) for flag, value in self.report.items()}


def _of_budget(value: str | Mapping[str, str], budget: str) -> str:
    return value if isinstance(value, str) else value.get(budget, value['small'])
