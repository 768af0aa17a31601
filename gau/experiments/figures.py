"""The pictures of a report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gau import plots
from gau.experiments.report import MORE_IS_BETTER, Report, mean_curve, shown
from gau.experiments.runs import BY_RANGE

# Names that a legend has among the curves, at most, and inches of a line of one below them.
MOST_INSIDE = 3
LINE_INCHES = 0.17


def draw(report: Report, stem: Path) -> list[Path]:
    """Draws what there is to draw, and returns the paths.

    STEM_tokens.png and STEM_time.png: held-out loss, mean and 95 % band; STEM_values.png: the last loss over the swept
    value, where one field is a number; STEM_speed.png: the last loss over tokens/s, better to the upper right. Those
    over time and speed are left out where runs shared a device; what an earlier report drew of them is deleted. Of what
    eval.py measured, STEM_by_place.png and the like: losses over where a target stands.
    """
    paths = []
    names = sorted({name for row in report.rows for run in row.runs.values() for name in run.curves})
    for name, drawn in (
        *((name.removeprefix('loss_'), _by_range(report, name)) for name in names if name.startswith(BY_RANGE)),
        ('tokens', _curves(report, column=0, label='tokens')),
        ('time', _curves(report, column=1, label='seconds of training') if report.timed else None),
        ('values', _values(report)),
        ('speed', _speed(report) if report.timed else None),
    ):
        path = stem.with_name(f'{stem.name}_{name}.png')
        if drawn is None:
            path.unlink(missing_ok=True)
        else:
            paths.append(path)
            plots.save(drawn, path)
    return paths


def _curves(report: Report, *, column: int, label: str) -> Any:
    # With two evaluations or fewer, the training loss says more.
    split = report.options.split
    if all(len(mean_curve(row, split)) < 3 for row in report.rows):
        split = 'train'
    figure, axes = plots.figure(label, f'{split} loss (nats per token)', report.options.title)
    plots.shorten_numbers(axes)
    lowest, early = [], []
    for row in report.rows:
        curve = mean_curve(row, split)
        if not len(curve):
            continue
        (line,) = axes.plot(curve[:, column], curve[:, 2], label=_name(row.values))
        axes.fill_between(curve[:, column], curve[:, 3], curve[:, 4], color=line.get_color(), alpha=0.2, linewidth=0)
        lowest.append(curve[:, 2].min())
        early.append(curve[len(curve) // 10, 2])
    if not lowest:
        return None
    # The first steps would flatten all that matters.
    room = 0.05 * (max(early) - min(lowest)) or 0.1
    axes.set_ylim(min(lowest) - room, max(early) + room)
    _legend(axes, report.rows[0].values)
    return figure


def _by_range(report: Report, name: str) -> Any:
    figure, axes = plots.figure(name.removeprefix(BY_RANGE), 'loss (nats per token)', report.options.title)
    for row in report.rows:
        curve = mean_curve(row, name)
        if len(curve):
            axes.plot(curve[:, 0], curve[:, 2], marker='.', label=_name(row.values))
    axes.set_xscale('log', base=2)
    _legend(axes, report.rows[0].values)
    return figure


def _values(report: Report) -> Any:
    numeric = [
        field
        for field in report.rows[0].values
        if all(isinstance(row.values[field], int | float) for row in report.rows)
        and len({row.values[field] for row in report.rows}) > 1
    ]
    if not numeric:
        return None
    field = max(numeric, key=lambda name: len({row.values[name] for row in report.rows}))
    figure, axes = plots.figure(field, _metric(report), report.options.title)
    lines: dict[str, list] = {}
    for row in report.rows:
        rest = {name: value for name, value in row.values.items() if name != field}
        lines.setdefault(_name(rest), []).append((row.values[field], row.mean.value, row.mean.half or 0.0))
    for name, points in lines.items():
        x, y, half = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=half, marker='o', capsize=3, label=name or None)
    values = sorted({row.values[field] for row in report.rows})
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axes.set_xscale('log', base=2 if all(isinstance(value, int) for value in values) else 10)
    axes.set_xticks(values, [f'{value:g}' for value in values])
    axes.minorticks_off()
    if any(lines):
        _legend(axes, [name for name in report.rows[0].values if name != field])
    return figure


def _speed(report: Report) -> Any:
    rows = [row for row in report.rows if row.speed]
    if len(rows) < 2:
        return None
    figure, axes = plots.figure('tokens/s', f'{_metric(report)}, better upwards', report.options.title)
    for row in rows:
        half = row.mean.half or 0.0
        axes.errorbar(
            row.speed, row.mean.value, yerr=half, marker='o', capsize=3, linestyle='', label=_name(row.values)
        )
    axes.set_xlim(0, 1.25 * max(row.speed for row in rows))
    plots.shorten_numbers(axes)
    _legend(axes, report.rows[0].values)
    if report.options.metric not in MORE_IS_BETTER:
        axes.invert_yaxis()
    return figure


def _legend(axes: Any, fields: Iterable[str]) -> None:
    """Says what the values in the names of rows are of: below the axes, where it would hide the curves."""
    names = axes.get_legend_handles_labels()[1]
    below, place = len(names) > MOST_INSIDE, {}
    if below:
        axes.figure.set_figheight(axes.figure.get_figheight() + LINE_INCHES * (len(names) + 1))
        place = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.12)}
    axes.legend(fontsize=8, title=', '.join(fields), title_fontsize=8, **place)


def _metric(report: Report) -> str:
    unit = {'loss': ' (nats per token)'}.get(report.options.metric, '')
    return f'{report.options.split} {report.options.metric}{unit}'


def _name(values: dict[str, Any]) -> str:
    return ', '.join(map(shown, values.values()))
