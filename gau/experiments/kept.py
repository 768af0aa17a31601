"""Runs that are kept as JSON lines, in place of points of a sweep: what is answered already is not run again.

A kept run is a point's if the configs of both have the same meaning today (fields that configs have got since stand at
their defaults), the seed is the same, and so are the data and the tokenizer, by what they hold and not by their names.
Where the data are not on this machine, their names are compared, and of several preparations of them the one that most
of the runs are of is taken.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import places
from gau.errors import UserError
from gau.experiments import runs
from gau.experiments.directory import SWEEP
from gau.experiments.runs import Run
from gau.experiments.sweep import Point
from gau.objectives import objective as objectives
from gau.training.config import RESUMABLE_CHANGES
from gau.training.workdir import write_text

# In place of a source (see `match`): runs of any text, for the table does not say which it is of.
ANY = ''
# Another run that this one starts or learns from: the config names it and does not say what it holds.
_OTHER_RUNS = ('fork', 'init_from', 'distillation.teacher')
# Compared by what they hold.
_DATA = ('data.source', 'data.valid_source', 'data.test_source', 'data.tokenizer')
# What changes neither what is computed nor what is measured at the end.
_FREE = (*RESUMABLE_CHANGES, 'checkpoint.', 'eval.every_')


class Kept(NamedTuple):
    """A run, and the file or directory that has it."""

    run: Run
    path: Path


class Matches(NamedTuple):
    """What kept runs answer of some points.

    Attributes:
      points: for each point the run that is kept of it, or None.
      other_seeds: runs of the points' settings with seeds that no point has, and one point of that setting.
      other_data: runs that would be points' but for their data.
    """

    points: list[Kept | None]
    other_seeds: list[tuple[Kept, Point]]
    other_data: list[Kept]

    def told(self) -> str:
        """Returns in a line how many points are kept, of which data, and how many are of other data."""
        own = [kept for kept in self.points if kept]
        line = f'{len(own)} of {len(self.points)} points are kept' + (f', of {_told(own)}' if own else '')
        if self.other_data:
            line += f'; {len(self.other_data)} are kept of other data, {_told(self.other_data)}, and do not count'
        return line


class Missing(NamedTuple):
    """A run that is still to be made, and all tables that ask for it; the point is that of the first."""

    point: Point
    tables: list[str]


def load(paths: Sequence[Path]) -> list[Kept]:
    """Returns the runs of files of kept runs, of all such files in directories, and the finished ones of sweeps.

    Raises:
      UserError: something is not there, or cannot be read.
    """
    found = []
    for path in paths:
        if path.is_dir() and not (path / SWEEP).is_file():
            files = sorted(path.glob(f'*{runs.KEPT}'))
        else:
            files = [path] if path.is_dir() or (path.is_file() and path.suffix == runs.KEPT) else []
        if not files:
            raise UserError(f'--kept={path} is no file of kept runs (*{runs.KEPT}), no directory of them and no sweep')
        found += [Kept(run, file) for file in files for run in runs.find([file])[0]]
    return found


def match(points: Sequence[Point], found: Sequence[Kept], *, source: str | None = None) -> Matches:
    """Returns which points are kept.

    Args:
      points: of one sweep or several; refused ones and those that start or learn from another run are never kept.
      found: from `load`; of two runs of one point the first is taken.
      source: the `data.source` in whose place the points have another, because it is not here, or ANY; None: theirs.
    """
    by_setting: dict[str, list[Kept]] = {}
    for kept in found:
        if not any(kept.run.config.get(field) for field in _OTHER_RUNS):
            by_setting.setdefault(_setting(kept.run.config), []).append(kept)
    settings = [_setting(runs.flat(point.config)) if _stands_alone(point) else None for point in points]
    of_settings = [by_setting.get(setting, []) for setting in settings]
    of_data = _of_the_same_data(points, of_settings, source)
    chosen, other_seeds, other_data, asked = [], {}, [], set()
    for point, setting, own, anyhow in zip(points, settings, of_data, of_settings, strict=True):
        # The first of a seed wins.
        by_seed = {kept.run.seed: kept for kept in reversed(own)}
        seed = point.config.seed if setting else None
        chosen.append(by_seed.get(seed))
        asked.add((setting, seed))
        if chosen[-1] is None:
            other_data += [kept for kept in anyhow if kept.run.seed == seed][:1]
        for other, kept in sorted(by_seed.items()):
            other_seeds.setdefault((setting, other), (kept, point))
    return Matches(chosen, [each for key, each in other_seeds.items() if key not in asked], other_data)


def write(points: Sequence[Point], matches: Matches, path: Path, *, source: str | None = None) -> None:
    """Writes the matches as kept runs that are named as the points, for a sweep's directory or a report.

    Runs of other seeds than the points' are of their rows, too. The names of the data are the points', unless these
    have another `source` (see `match`).
    """
    own = [(kept, point, point.name) for kept, point in zip(matches.points, points, strict=True) if kept]
    own += [(kept, point, f'{point.label}-seed_{kept.run.seed}') for kept, point in matches.other_seeds]
    renamed = [_renamed(kept.run, point, name, of_data=source is None) for kept, point, name in own]
    write_text(path, runs.dump(renamed, {'report': None}) if renamed else '')


def missing(
    tables: Mapping[str, Sequence[Point]], found: Sequence[Kept], *, sources: Mapping[str, str | None] | None = None
) -> tuple[list[Missing], Matches]:
    """Returns the runs that the points of tables ask for and nobody has kept, each once whatever tables it serves.

    What is kept of all the points comes with them. Tables are matched one by one: runs of one are of one text.

    Args:
      tables: points by the name of the table.
      found: see `match`.
      sources: by the name of a table the `source` of `match`; None: the points' own, of all.
    """
    missed: dict[str, Missing] = {}
    of_all = Matches([], [], [])
    for table, points in tables.items():
        asked = [point for point in points if point.config is not None]
        matches = match(asked, found, source=(sources or {}).get(table))
        for point, answer in zip(asked, matches.points, strict=True):
            if answer is None:
                own = missed.setdefault(point.config.to_json(sort_keys=True), Missing(point, []))
                own.tables.append(table)
        for whole, own in zip(of_all, matches, strict=True):
            whole.extend(own)
    return list(missed.values()), of_all


def _told(found: Sequence[Kept]) -> str:
    """Returns what runs say of their data, `tokens:wiki_en (0e5995a3f8d56085)`."""
    facts = [kept.run.facts['data'] for kept in found]
    return ', '.join(sorted({f'{name} ({held})' for data in facts for name, held in data.items()}))


def _stands_alone(point: Point) -> bool:
    return point.config is not None and not any(runs.flat(point.config).get(field) for field in _OTHER_RUNS)


def _setting(config: Mapping[str, Any]) -> str:
    """Returns all that decides the result of a run but for its seed and its data.

    Fields without a value are left out: which of them a config has depends on the models that are known by then.
    """
    # What is drawn is held by nothing: its name, `pairs:16`, is all that says what it is.
    drawn = ('data.source',) if config['data.source'].startswith('pairs:') else ()
    free = {*_DATA, 'seed'}.difference(drawn)
    meant = {k: v for k, v in config.items() if v is not None and k not in free and not k.startswith(_FREE)}
    return json.dumps(meant, sort_keys=True)


def _of_the_same_data(
    points: Sequence[Point], of_settings: Sequence[Sequence[Kept]], source: str | None
) -> list[list[Kept]]:
    """Returns of the runs of each point's setting those of its data."""
    groups: dict[tuple, list[int]] = {}
    for number, (point, found) in enumerate(zip(points, of_settings, strict=True)):
        if found:
            groups.setdefault(_names(runs.flat(point.config), source), []).append(number)
    own: list[list[Kept]] = [[] for _ in points]
    for names, numbers in groups.items():
        held = _held(points[numbers[0]].config) if source is None else None
        if held is None:
            anyhow = [kept for number in numbers for kept in of_settings[number]]
            named = [kept for kept in anyhow if source == ANY or _names(kept.run.config) == names]
            if not named:
                continue
            ((held, _),) = Counter(_held_by(kept.run) for kept in named).most_common(1)
        for number in numbers:
            own[number] = [kept for kept in of_settings[number] if _held_by(kept.run) == held]
    return own


def _held(config: ConfigDict) -> tuple[str, ...] | None:
    """Returns what the sources and the tokenizer of a config hold; None if they are not here."""
    try:
        lines = [line.partition(' ') for line in places.contents(config.data)]
        tokenizer = objectives.load(config.objective).tokenizer(config.data)
    except (UserError, OSError):
        return None
    kinds = ('source', 'valid_source', 'test_source')
    return (*(held for kind, _, held in lines if kind in kinds), str(tokenizer.fingerprint))


def _held_by(run: Run) -> tuple[str, ...]:
    """Returns the same of a kept run; of old ones, which tell their data otherwise, what equals nothing of today."""
    return (*run.facts['data'].values(), str(run.facts['tokenizer']))


def _names(config: Mapping[str, Any], source: str | None = None) -> tuple[str | None, ...]:
    """Returns the data by name, without the directories that lead there."""
    config = {**config, 'data.source': source or config['data.source']}
    prepared = config['data.source'].startswith('tokens:')
    # Prepared data bring their tokenizer.
    named = [config[field] for field in _DATA if not (prepared and field == 'data.tokenizer')]
    return tuple(name and f'{name.partition(":")[0]}:{Path(name.partition(":")[2]).name}' for name in named)


def _renamed(run: Run, point: Point, name: str, *, of_data: bool) -> Run:
    """Returns a kept run as one of the point's sweep, with the point's names of the data or its own."""
    run = run._replace(name=name, label=point.label, swept=runs.swept_fields(point.overrides))
    if not of_data:
        return run
    today = runs.flat(point.config)
    sources = [*data_config.sources(point.config.data), point.config.data.valid_source, point.config.data.test_source]
    named = [runs.without_place(source) for source in sources if source]
    return run._replace(
        config={**run.config, **{field: today[field] for field in _DATA}},
        facts={**run.facts, 'data': dict(zip(named, run.facts['data'].values(), strict=True))},
    )
