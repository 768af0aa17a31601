"""A named table: the sweep and the report that make it, stated by a config program as its `TABLE`."""

from collections.abc import Mapping
from typing import NamedTuple


class Table(NamedTuple):
    """What `scripts/reproduce.py` runs for a config program.

    Attributes:
      title: of the page.
      sweeps: by budget, what `scripts/sweep.py --sweep` takes; `small` stands for a budget that is not there.
      report: flags of `scripts/report.py` by name.
    """

    title: str
    sweeps: Mapping[str, str]
    report: Mapping[str, str] = {}

    def sweep(self, budget: str) -> str:
        """Returns the sweep of a budget."""
        return self.sweeps.get(budget, self.sweeps['small'])
