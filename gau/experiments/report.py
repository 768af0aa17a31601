"""Runs as one table: a row for each setting, over its seeds, and what differences between rows are worth."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gau.errors import UserError, did_you_mean
from gau.experiments import statistics
from gau.experiments.runs import Run, differing
from gau.experiments.statistics import Comparison, Mean, Sigma
from gau.experiments.sweep import literal
from gau.models.architectures import ARCHITECTURES
from gau.training.lowest import is_worse

# Without --by: more swept fields than these are asked for by name.
MAX_FIELDS = 4
LABEL = 'point'
# What rows may be made by beside a config's fields: the records that a model is made of, told by their files.
RECORDS = ('family', 'attention')
ALLOWED = ('data', 'tokens')
# Of what evaluators measure; of all else, losses and what is made of them, less is better.
MORE_IS_BETTER = ('accuracy', 'keys', 'macro_f1', 'matthews')
# Held-out tokens of runs in one table may differ by so much: contexts cut the end of a text off differently.
EVAL_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    """What a report is asked to show.

    Attributes:
      by: fields whose values make the rows, or LABEL, or of RECORDS; empty: those that the sweeps set.
      against: the row that others are compared with: its value of the first field, or `field=value,...`.
      best: a field of which each row keeps only the value with the best mean of the metric.
      split, metric: of final.json.
      allow: of ALLOWED, what may differ between runs of one table.
      title: of the page.
    """

    by: tuple[str, ...] = ()
    against: str | None = None
    best: str | None = None
    split: str = 'valid'
    metric: str = 'loss'
    allow: tuple[str, ...] = ()
    title: str = 'Report'


class Row(NamedTuple):
    """One setting.

    Attributes:
      values: of the fields that make the rows.
      runs: by seed.
      mean: of the metric.
      speed: tokens/s, the median of the runs.
      against: the difference to the baseline's row; None for the baseline, and where there is none.
      holm: the p value corrected for all comparisons of the table; None without one.
      reached: (tokens, seconds of training) when the mean held-out loss came to the baseline's last one; None if never.
    """

    values: dict[str, Any]
    runs: dict[int, Run]
    mean: Mean
    speed: float | None
    against: Comparison | None = None
    holm: float | None = None
    reached: tuple[float, float] | None = None


class Report(NamedTuple):
    """A table.

    Attributes:
      options: as asked for, with `by` filled.
      rows: in order.
      sigma: between seeds, of the metric.
      residual: what rows and seeds leave unexplained of it.
      baselines: values of the row that others are compared with; of several rows if `by` has more fields.
      per_device: how many of the runs shared a device, at most.
    """

    options: Options
    rows: list[Row]
    sigma: Sigma
    residual: Sigma
    baselines: list[dict[str, Any]]
    per_device: int = 1

    @property
    def timed(self) -> bool:
        """Whether times and speeds say something: each run had its device to itself."""
        return self.per_device == 1


def make(runs: Sequence[Run], options: Options) -> Report:
    """Returns the table of finished runs.

    Raises:
      UserError: no runs; runs that are not comparable; an unknown field, row or metric; a row that would mix settings.
    """
    if not runs:
        raise UserError('no finished run to report')
    _check_comparable(runs, options)
    options = dataclasses.replace(options, by=options.by or _default_by(runs, options))
    groups = _groups(runs, options)
    rows = [_row(values, own, options) for values, own in groups]
    cells = [_cell(row, options) for row in rows]
    sigma = statistics.pooled_sigma([list(cell.values()) for cell in cells])
    residual = statistics.residual_sigma(cells)
    means = [statistics.mean_of_cell(list(cell.values()), sigma) for cell in cells]
    rows = [row._replace(mean=mean) for row, mean in zip(rows, means, strict=True)]
    found = _find_baselines(rows, options)
    rows = _compared(rows, cells, found, sigma, residual, options)
    baselines = [rows[index].values for index in sorted(set(found.values()))]
    per_device = max(run.facts.get('per_device', 1) for run in runs)
    return Report(options, rows, sigma, residual, baselines, per_device)


def value_of(run: Run, field: str) -> Any:
    """Returns a run's value of a field, its label, or the name of a record: `gated_unit`, `mixed_chunk`, ...

    Raises:
      UserError: the record of a model that is not there.
    """
    if field == LABEL:
        return run.label
    if field not in RECORDS:
        return run.config.get(field)
    name = run.config.get('model.name')
    if name not in ARCHITECTURES:
        raise UserError(f'--by={field}: {run.name} is a model "{name}", which is not registered')
    return type(getattr(ARCHITECTURES[name], field)).__module__.rpartition('.')[2]


def metric_of(run: Run, options: Options) -> float:
    """Returns a run's final result.

    Raises:
      UserError: it has no such split or metric.
    """
    where = f'--split={options.split}: {run.name}'
    if options.split not in run.metrics:
        raise UserError(f'{where} was not evaluated on it{did_you_mean(options.split, run.metrics)}')
    found = run.metrics[options.split].get(options.metric)
    if found is None:
        there = [name for name, value in run.metrics[options.split].items() if value is not None]
        raise UserError(
            f'--metric={options.metric}: {run.name} has no such result on {options.split}'
            f'{did_you_mean(options.metric, there)}'
        )
    return found


def frame(runs: Sequence[Run], options: Options) -> pd.DataFrame:
    """Returns a line a run: what the table is made of, and where it comes from."""
    return pd.DataFrame(
        {
            'run': run.name,
            **{field: value_of(run, field) for field in options.by},
            'seed': run.seed,
            **{f'{options.split}/{name}': value for name, value in run.metrics[options.split].items()},
            'config_hash': run.config_hash(),
            **{name: _text(value) for name, value in run.facts.items() if name != 'versions'},
        }
        for run in runs
    )


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return '; '.join(f'{name} {entry}' for name, entry in value.items())
    return ' '.join(value) if isinstance(value, list) else value


def _check_comparable(runs: Sequence[Run], options: Options) -> None:
    unknown = sorted(set(options.allow) - set(ALLOWED))
    if unknown:
        raise UserError(f'--allow={unknown[0]} is unknown{did_you_mean(unknown[0], ALLOWED)}')
    first = runs[0]
    for run in runs:
        checks = [
            ('data', 'data', first.facts['data'], run.facts['data']),
            ('data', 'tokenizers', first.facts['tokenizer'], run.facts['tokenizer']),
            ('data', 'objectives', first.config.get('objective'), run.config.get('objective')),
            ('tokens', 'lengths in tokens', first.facts['tokens'], run.facts['tokens']),
        ]
        for kind, what, one, other in checks:
            if one != other and kind not in options.allow:
                raise UserError(
                    f'{first.name} and {run.name} are of different {what} ({_text(one)}; {_text(other)}): one table '
                    f'would compare what cannot be compared; --allow={kind} does it nevertheless'
                )
        one, other = (found.metrics.get(options.split, {}).get('tokens') for found in (first, run))
        apart = one and other and abs(one - other) > EVAL_TOLERANCE * max(one, other)
        if apart and 'data' not in options.allow:
            raise UserError(
                f'{first.name} and {run.name} were evaluated on {one:,} and {other:,} tokens of {options.split}: one '
                'table would compare what cannot be compared; --allow=data does it nevertheless'
            )


def _default_by(runs: Sequence[Run], options: Options) -> tuple[str, ...]:
    """The swept fields that take several values; labels where a sweep set arguments; else what differs."""
    if all(run.swept is not None for run in runs):
        swept = dict.fromkeys(itertools.chain.from_iterable(run.swept for run in runs))
        several = tuple(path for path in swept if len({str(run.config.get(path)) for run in runs}) > 1)
        several = tuple(path for path in several if path != options.best)
        if len(several) <= MAX_FIELDS:
            return several or (LABEL,)
    elif any(run.label != run.name for run in runs) and options.best is None:
        return (LABEL,)
    fields = differing(runs)
    if len(fields) > MAX_FIELDS:
        raise UserError(f'the runs differ in {", ".join(fields[:8])}{" and more" if fields[8:] else ""}: choose --by')
    return tuple(fields) or (LABEL,)


def _groups(runs: Sequence[Run], options: Options) -> list[tuple[dict[str, Any], list[Run]]]:
    known = {LABEL, *RECORDS, *(path for run in runs for path in run.config)}
    for field in (*options.by, *filter(None, [options.best])):
        if field not in known:
            raise UserError(f'--by={field}: no run has such a field{did_you_mean(field, known)}')
    groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        values = {field: value_of(run, field) for field in options.by}
        groups.setdefault(str(values), (values, []))[1].append(run)
    found = [(values, _best(own, options)) for values, own in groups.values()]
    for values, own in found:
        mixed = [path for path in differing(own) if path not in options.by]
        if mixed:
            row = ', '.join(map(str, values.values()))
            raise UserError(f'row {row} would mix runs that differ in {", ".join(mixed[:5])}: add to --by')
        by_seed: dict[int, Run] = {}
        for run in own:
            if run.seed in by_seed:
                raise UserError(f'{by_seed[run.seed].name} and {run.name} are two runs of one setting and seed')
            by_seed[run.seed] = run
    return sorted(found, key=lambda group: tuple(_order(value) for value in group[0].values()))


def _best(runs: list[Run], options: Options) -> list[Run]:
    """Returns the runs with the value of `best` whose mean of the metric is best; one that is not a number is last."""
    if options.best is None:
        return runs
    by_value: dict[str, list[Run]] = {}
    for run in runs:
        by_value.setdefault(str(value_of(run, options.best)), []).append(run)
    means = [float(np.mean([metric_of(run, options) for run in own])) for own in by_value.values()]
    sign = -1 if options.metric in MORE_IS_BETTER else 1
    return list(by_value.values())[int(np.argmin(np.nan_to_num(sign * np.asarray(means), nan=np.inf)))]


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _row(values: dict[str, Any], own: list[Run], options: Options) -> Row:
    if options.best is not None:
        values = {**values, options.best: value_of(own[0], options.best)}
    runs = {run.seed: run for run in sorted(own, key=lambda run: run.seed)}
    speeds = [run.facts['tokens_per_second'] for run in own if run.facts['tokens_per_second']]
    speed = float(np.median(speeds)) if speeds else None
    return Row(values, runs, statistics.mean([metric_of(run, options) for run in runs.values()]), speed)


def _cell(row: Row, options: Options) -> dict[int, float]:
    return {seed: metric_of(run, options) for seed, run in row.runs.items()}


def _find_baselines(rows: Sequence[Row], options: Options) -> dict[int, int]:
    """Returns for each row the row it is compared with: the one that differs in the fields of `against` alone."""
    if options.against is None:
        return {}
    wanted = {}
    for part in options.against.split(','):
        field, equals, value = part.rpartition('=')
        wanted[field if equals else options.by[0]] = value
    for field in wanted:
        if field not in options.by:
            raise UserError(f'--against={options.against}: {field} is not in --by={",".join(options.by)}')
    found: dict[int, int] = {}
    rest = [field for field in options.by if field not in wanted]
    for index, row in enumerate(rows):
        for other, candidate in enumerate(rows):
            is_baseline = all(_is(candidate.values[field], value) for field, value in wanted.items())
            if is_baseline and all(candidate.values[field] == row.values[field] for field in rest):
                found[index] = other
    if not found:
        for field, value in wanted.items():
            there = {shown(row.values[field]) for row in rows}
            if not any(_is(row.values[field], value) for row in rows):
                raise UserError(f'--against={options.against}: no row has {field}={value}{did_you_mean(value, there)}')
        raise UserError(f'--against={options.against}: no row has all of these')
    return found


def _is(value: Any, text: str) -> bool:
    """Returns whether a text means a value: 2, 2.0 and 2e0 are one."""
    return str(value) == text or literal(text) == value


def shown(value: Any) -> str:
    """Returns a field's value as tables have it."""
    return f'{value:g}' if isinstance(value, float) else str(value)


def _compared(
    rows: Sequence[Row],
    cells: Sequence[dict[int, float]],
    baselines: dict[int, int],
    sigma: Sigma,
    residual: Sigma,
    options: Options,
) -> list[Row]:
    compared = list(rows)
    for index, other in baselines.items():
        reached = _reached(rows[index], rows[other], options)
        against = None if index == other else statistics.compare(cells[index], cells[other], sigma, residual)
        compared[index] = rows[index]._replace(against=against, reached=reached)
    tested = [index for index, row in enumerate(compared) if row.against and row.against.p is not None]
    for index, p in zip(tested, statistics.holm([compared[index].against.p for index in tested]), strict=True):
        compared[index] = compared[index]._replace(holm=p)
    return compared


def mean_curve(row: Row, split: str) -> np.ndarray:
    """Returns [points, 5]: tokens, seconds, mean loss, and the bounds of its 95 % interval, over a row's seeds.

    Only tokens at which all of them have a loss: how often a run was evaluated decides nothing of what it computes.
    """
    curves = [{point[0]: point for point in run.curves[split]} for run in row.runs.values() if run.curves.get(split)]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    if not shared:
        return np.empty((0, 5))
    stacked = np.asarray([[curve[tokens] for tokens in shared] for curve in curves])
    means = [statistics.mean(losses) for losses in stacked[:, :, 2].T]
    halves = np.array([mean.half or 0.0 for mean in means])
    values = np.array([mean.value for mean in means])
    return np.column_stack([stacked[0, :, 0], stacked[:, :, 1].mean(0), values, values - halves, values + halves])


def _reached(row: Row, baseline: Row, options: Options) -> tuple[float, float] | None:
    """Tokens and seconds at which the row's held-out loss came to the baseline's last one, between evaluations."""
    curve, goal = mean_curve(row, options.split), mean_curve(baseline, options.split)
    if not len(curve) or not len(goal):
        return None
    losses, last = curve[:, 2], goal[-1, 2]
    first = int(np.argmax(losses <= last))
    if losses[first] > last:
        return None
    if first == 0 or losses[first - 1] == losses[first]:
        return float(curve[first, 0]), float(curve[first, 1])
    share = (losses[first - 1] - last) / (losses[first - 1] - losses[first])
    tokens, seconds = curve[first - 1, :2] + share * (curve[first, :2] - curve[first - 1, :2])
    return float(tokens), float(seconds)


def risen(report: Report) -> list[tuple[Row, float, float, float]]:
    """Returns the rows whose mean held-out loss was lower before the end, by more than chance.

    With each the tokens at which it was lowest, how low, and the last one. A kept run has its curve of training, and
    one of what eval.py measured has none.
    """
    found = []
    for row in report.rows:
        curve = mean_curve(row, report.options.split)
        if len(curve) and is_worse(curve[-1, 2], curve[:, 2].min()):
            best = int(np.argmin(curve[:, 2]))
            found.append((row, float(curve[best, 0]), float(curve[best, 2]), float(curve[-1, 2])))
    return found


def kept_paths(stem: Path) -> dict[str, Path]:
    """Returns the files of a report beside each other: page, runs as JSON lines and as CSV."""
    return {kind: stem.with_name(f'{stem.name}.{kind}') for kind in ('md', 'jsonl', 'csv')}
