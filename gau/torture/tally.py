"""What came of the faults: counts by scene, and the table of them."""

import dataclasses
import json
from collections.abc import Iterable


@dataclasses.dataclass
class Tally:
    """Counts of one scene.

    Attributes:
      scene: its name.
      faults: how many were injected, that is, met a program that was running or a file that was read.
      runs: programs started, or, in one process, calls of the house's functions.
      refused: how many said in one line that they cannot go on.
      differ: results that are not those of undisturbed runs, and refusals that wrote over something.
      lost: steps, or finished pieces of work, that were there before a fault and not after it.
      tracebacks: programs that printed one.
      notes: a line for each of the last three.
    """

    scene: str
    faults: int = 0
    runs: int = 0
    refused: int = 0
    differ: int = 0
    lost: int = 0
    tracebacks: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def differs(self, what: str) -> None:
        """Notes a result that is another."""
        self.differ += 1
        self.notes.append(f'{self.scene}: result differs: {what}')

    def loses(self, work: int, what: str) -> None:
        """Notes work that is gone, if any is."""
        if work > 0:
            self.lost += work
            self.notes.append(f'{self.scene}: {work} lost: {what}')

    def prints(self, what: str, text: str) -> None:
        """Notes a traceback, or the stacks of a crash, if there are any in what a program printed."""
        if 'Traceback (most recent call last)' in text or 'Fatal Python error' in text:
            self.tracebacks += 1
            self.notes.append(f'{self.scene}: traceback: {what}: {" | ".join(text.strip().splitlines()[-12:])}')

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.differ or self.lost or self.tracebacks)

    def add(self, other: 'Tally') -> None:
        """Adds another tally's counts to this one's, in place."""
        for field in dataclasses.fields(self):
            if field.name != 'scene':
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


_COLUMNS = {
    'faults': 'faults injected',
    'runs': 'runs',
    'refused': 'refused in one line',
    'differ': 'results that differ',
    'lost': 'work lost',
    'tracebacks': 'tracebacks',
}


def table(tallies: Iterable[Tally]) -> str:
    """Returns a Markdown table with a row for each scene that ran and one for the sum."""
    total = Tally('all')
    rows = [tally for tally in tallies if tally.runs]
    for tally in rows:
        total.add(tally)
    lines = [f'| scene | {" | ".join(_COLUMNS.values())} |', f'|---|{"---:|" * len(_COLUMNS)}']
    for tally in [*rows, total]:
        lines.append(f'| {tally.scene} | {" | ".join(str(getattr(tally, name)) for name in _COLUMNS)} |')
    return '\n'.join(lines)


def to_json(tally: Tally) -> str:
    """Returns a tally as one line."""
    return json.dumps(dataclasses.asdict(tally))


def from_json(line: str) -> Tally:
    """Returns the tally of `to_json`."""
    return Tally(**json.loads(line))
