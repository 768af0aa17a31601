"""A report as a page of Markdown: what is made stands between two marks, so that people can write around it."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from gau.errors import UserError
from gau.experiments.report import LABEL, Report, Row, risen, shown
from gau.experiments.runs import Run
from gau.experiments.statistics import MIN_DEGREES, MIN_PAIRS, Judge
from gau.training.lowest import WORSE

BEGIN = '<!-- made by scripts/report.py: do not edit between the marks -->'
END = '<!-- end of what scripts/report.py made -->'
# Rows that a note names.
MOST_TOLD = 5
# Columns of a line of the notes.
WIDTH = 100
# Parameters that differ by this share or less say nothing of a loss, and stand below.
SAME_SIZE = 0.05


class _Layout(NamedTuple):
    """What a table shows; what is the same in all rows is said below it, once.

    Attributes:
      heads: of the columns that tell rows apart.
      names: of each row, what stands in these columns.
      told: what heads and names leave out.
      sizes: whether rows differ enough in their parameters for these to stand beside the losses.
      n: of all rows; None where it differs.
      tests: differences that have a p.
      reached: whether any row came to its baseline's last loss.
    """

    heads: list[str]
    names: list[list[str]]
    told: list[str]
    sizes: bool
    n: int | None
    tests: int
    reached: bool


def table(report: Report) -> str:
    """Returns the table, how it is to be read, and where every row comes from, as Markdown."""
    layout = _layout(report)
    return '\n\n'.join([_results(report, layout), _notes(report, layout), _provenance(report, layout)])


def write(report: Report, path: Path, figures: Sequence[Path]) -> None:
    """Writes the page, or renews what stands between its marks.

    Raises:
      UserError: a page without marks is there already.
    """
    pictures = '\n'.join(f'![{figure.stem}]({figure.name})' for figure in figures)
    body = f'{BEGIN}\n\n{table(report)}\n\n{pictures}\n\n{END}\n'
    if path.exists():
        before, after = _around(path)
        path.write_text(before + body + after)
    else:
        path.write_text(f'# {report.options.title}\n\n{body}')


def check(report: Report, path: Path) -> bool:
    """Returns whether the page has the table that the report gives.

    Raises:
      UserError: there is no page, or one without marks.
    """
    if not path.is_file():
        raise UserError(f'{path} does not exist')
    text = path.read_text()
    _around(path)
    return table(report) in text[text.index(BEGIN) : text.index(END)]


def _around(path: Path) -> tuple[str, str]:
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f'{path} was not made by scripts/report.py (its marks are missing)')
    before, _, rest = text.partition(BEGIN)
    return before, rest.partition(END + '\n')[2]


def _layout(report: Report) -> _Layout:
    rows = report.rows
    texts = {field: [shown(row.values[field]) for row in rows] for field in rows[0].values}
    own = [field for field in texts if len(set(texts[field])) > 1] or list(texts)
    heads, told = _heads(own), []
    if heads != own:
        told.append(f'Rows are told apart by {", ".join(own)}.')
    told += [f'{field} is {values[0]} in all rows.' for field, values in texts.items() if field not in own]
    if len(rows) > 1 and LABEL in own:
        start = _common_start(texts[LABEL])
        texts[LABEL] = [text.removeprefix(start) for text in texts[LABEL]]
        if start:
            told.append(f'The names of all points begin with {start} as well.')
    sizes = [run.facts['parameters'] for row in rows for run in row.runs.values()]
    seeds = {row.mean.n for row in rows}
    return _Layout(
        heads,
        [[texts[field][number] for field in own] for number in range(len(rows))],
        told,
        max(sizes) > (1 + SAME_SIZE) * min(sizes),
        seeds.pop() if len(seeds) == 1 else None,
        sum(row.holm is not None for row in rows),
        any(row.reached for row in rows),
    )


def _common_start(names: Sequence[str]) -> str:
    """Returns the parts of points' names, with a hyphen behind each, that all begin with: `pairs_128-`, or nothing."""
    parts = [name.split('-')[:-1] for name in names]
    alike = itertools.takewhile(lambda own: len(set(own)) == 1, zip(*parts, strict=False))
    return ''.join(f'{own[0]}-' for own in alike)


def _heads(fields: Sequence[str]) -> list[str]:
    """Returns the last parts of fields, which say enough: chunk_size, and model of model.name; all of them if not."""
    heads = [field.removesuffix('.name').rpartition('.')[2] for field in fields]
    return heads if len(set(heads)) == len(heads) else list(fields)


def _results(report: Report, layout: _Layout) -> str:
    options, rows, timed = report.options, report.rows, report.timed
    columns = list(zip(layout.heads, zip(*layout.names, strict=True), strict=True))
    if layout.sizes:
        columns.append(('parameters', [_parameters(row) for row in rows]))
    if layout.n is None:
        columns.append(('n', [str(row.mean.n) for row in rows]))
    columns.append((f'{options.split} {options.metric}', [row.mean.format() for row in rows]))
    if report.baselines:
        columns.append(('difference', [_difference(row, report) for row in rows]))
    if layout.tests:
        columns.append(('p', [_p(row.against and row.against.p) for row in rows]))
    if layout.tests > 1:
        columns.append(('p (Holm)', [_p(row.holm) for row in rows]))
    if timed:
        columns.append(('tokens/s', ['-' if row.speed is None else f'{row.speed:,.0f}' for row in rows]))
    if layout.reached:
        columns.append(('reached', [_tokens(row.reached[0]) if row.reached else '-' for row in rows]))
    if layout.reached and timed:
        columns.append(('time', [_seconds(row.reached[1]) if row.reached else '-' for row in rows]))
    heads, cells = zip(*columns, strict=True)
    return markdown([heads, *zip(*cells, strict=True)], numbers=len(layout.heads))


def _difference(row: Row, report: Report) -> str:
    if row.values in report.baselines:
        return 'baseline'
    if row.against is None:
        return '-'
    few = row.against.shared < row.against.smaller
    return row.against.difference.format('+') + f' (n={row.against.shared})' * few


def _notes(report: Report, layout: _Layout) -> str:
    sigma, options, timed = report.sigma, report.options, report.timed
    notes = [' '.join(layout.told)] if layout.told else []
    if layout.n == 1:
        notes.append('A row is one run (n = 1): nothing here says how far chance goes.')
    else:
        n = f'n = {layout.n}' if layout.n else 'n'
        notes.append(f'A cell is the mean over {n} seeds ± half the width of its 95 % interval (Student t).')
    if sigma.value is not None:
        few = any(row.mean.n < MIN_PAIRS and row.mean.half is not None for row in report.rows)
        judges = few and sigma.degrees >= MIN_DEGREES
        notes.append(
            f'Standard deviation between seeds: {sigma.value:.4f}, over all rows, {sigma.degrees} degrees of freedom'
            f'{"; the interval of fewer than three seeds is by it" * judges}.'
        )
    if report.baselines:
        tested = ', p by the two-sided paired t test' if layout.tests else ''
        corrected = '; p (Holm) is corrected for all comparisons of the table' if layout.tests > 1 else ''
        baseline = options.against.replace(',', ', ')
        notes.append(
            f'Differences are to the row {baseline}, seed by seed (the same seed sees the same batches in the same '
            f'order){tested}{corrected}.'
        )
    if layout.reached:
        notes.append(
            f"Reached: tokens{' and time' * timed} of training to the baseline's last loss, read between evaluations "
            f'of one run whose learning rate goes on falling{"; time is that of training steps alone" * timed}.'
        )
    compared = [row.against for row in report.rows if row.against]
    if any(found.judge is Judge.RESIDUAL for found in compared):
        notes.append(
            'Where a row and its baseline share two seeds, interval and p are by the standard deviation that the '
            'effects of rows and seeds leave over in the whole table, taken to be the same in all rows (randomized '
            f'blocks): {report.residual.value:.4f}, {report.residual.degrees} degrees of freedom.'
        )
    if any(found.judge is Judge.MEANS for found in compared):
        notes.append(
            'Where a row and its baseline share fewer than two seeds, their means are compared, interval and p by the '
            'standard deviation between seeds over all rows, taken to be the same in these two.'
        )
    if any(found.shared < found.smaller for found in compared):
        notes.append('n in a difference: seeds that a row and its baseline share, where each has others besides.')
    if not timed:
        notes.append(
            f'Up to {report.per_device} of the runs shared a device: times and speeds say nothing and are left out.'
        )
    if options.best:
        notes.append(
            f'{options.best} is the best of those tried, by the same {options.split} {options.metric} that is shown.'
        )
    found = risen(report)
    if found:
        names = {id(row): ', '.join(own) for row, own in zip(report.rows, layout.names, strict=True)}
        told = [
            f'{names[id(row)]} ({lowest:.3f} at {_tokens(tokens)} tokens, {last:.3f} at the end)'
            for row, tokens, lowest, last in found[:MOST_TOLD]
        ]
        more = f' and {len(found) - MOST_TOLD} more' if len(found) > MOST_TOLD else ''
        notes.append(
            f'The {options.split} loss was lower before the end, by {WORSE} nats or more, in {"; ".join(told)}{more}.'
        )
    if options.allow:
        notes.append(f'The runs differ in {" and ".join(options.allow)}.')
    return '\n'.join(_bullet(note) for note in notes)


def _provenance(report: Report, layout: _Layout) -> str:
    """A line for each row, and before it what all rows have in common."""
    columns = (*([] if layout.sizes else ['parameters']), 'config', 'commit', 'device', 'tokens', 'tokenizer', 'data')
    lines = [
        [', '.join(names), *(_origin(row)[name] for name in columns)]
        for row, names in zip(report.rows, layout.names, strict=True)
    ]
    common, own = [], [0]
    for number, name in enumerate(columns, 1):
        texts = {line[number] for line in lines}
        if len(texts) == 1:
            common.append(f'{name} {texts.pop()}')
        else:
            own.append(number)
    head = ['row', *columns]
    shared = _filled(f'All rows: {", ".join(common)}.') + '\n\n' if common else ''
    commands = dict.fromkeys(next(iter(row.runs.values())).facts['command'] for row in report.rows)
    told = '\n'.join(f'    {command}' for command in commands if command)
    text = shared + markdown([[line[number] for number in own] for line in (head, *lines)], numbers=len(own))
    return f'{text}\n\nCommands, one seed of each row:\n\n{told}' if told else text


def _origin(row: Row) -> dict[str, str]:
    runs = list(row.runs.values())
    commits = dict.fromkeys(commit for run in runs for commit in run.facts['commits'])
    data = dict.fromkeys(f'{source} ({identity})' for run in runs for source, identity in run.facts['data'].items())
    return {
        'parameters': _parameters(row),
        'config': ' '.join(dict.fromkeys(run.config_hash() for run in runs)),
        'commit': ' '.join(commits) or 'not kept',
        'device': '; '.join(dict.fromkeys(run.facts['device'] for run in runs)),
        'tokens': _trained_on(runs),
        'tokenizer': ' '.join(dict.fromkeys(str(run.facts['tokenizer']) for run in runs)),
        'data': ', '.join(data),
    }


def _trained_on(runs: Iterable[Run]) -> str:
    """Returns the tokens of training, and how often these passed over the text, where a run of as many knows it."""
    passes = {}
    for run in runs:
        known = ' and '.join(run.facts.get('passes', {}).values())
        passes[run.facts['tokens']] = known or passes.get(run.facts['tokens'], '')
    return ' '.join(
        f'{tokens:,}' + (f' ({known} passes over the text)' if known else '') for tokens, known in passes.items()
    )


def markdown(rows: Sequence[Sequence[str]], *, numbers: int) -> str:
    """Returns rows of cells as a Markdown table, aligned in the source, too.

    Args:
      rows: the head first.
      numbers: columns from here on are aligned to the right.
    """
    rows = [[cell.replace('|', '\\|') for cell in row] for row in rows]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = [
        [cell.ljust(w) if i < numbers else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ['-' * w if i < numbers else '-' * (w - 1) + ':' for i, w in enumerate(widths)]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in (lines[0], rule, *lines[1:]))


def _bullet(note: str) -> str:
    return _filled(note, initial_indent='- ', subsequent_indent='  ')


def _filled(text: str, **indent: str) -> str:
    # A field's name is not cut at its hyphens, nor is a long one.
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False, **indent)


def _parameters(row: Row) -> str:
    found = sorted({run.facts['parameters'] for run in row.runs.values()})
    return ' '.join(f'{number / 1e6:.2f} M' for number in found)


def _p(p: float | None) -> str:
    if p is None:
        return '-'
    if p >= 0.001 or not math.isfinite(p):
        return f'{p:.3f}'
    digits, _, exponent = f'{p:.1e}'.partition('e')
    return f'{digits}e{int(exponent)}'


def _tokens(tokens: float) -> str:
    return f'{tokens / 1e6:,.1f} M' if tokens >= 1e5 else f'{tokens:,.0f}'


def _seconds(seconds: float) -> str:
    return (
        f'{seconds:.0f} s'
        if seconds < 600
        else f'{seconds / 60:.0f} min'
        if seconds < 36_000
        else f'{seconds / 3600:.1f} h'
    )
