"""A report as a page of Markdown: what is made stands between two marks, so that people can write around it."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from gau.errors import UserError
from gau.experiments.report import Report, Row, risen, shown
from gau.experiments.runs import Run
from gau.experiments.statistics import Judge
from gau.training.lowest import WORSE

BEGIN = '<!-- made by scripts/report.py: do not edit between the marks -->'
END = '<!-- end of what scripts/report.py made -->'
# Rows that a note names.
MOST_TOLD = 5
# Columns of a line of the notes.
WIDTH = 100


def table(report: Report) -> str:
    """Returns the table, how it is to be read, and where every row comes from, as Markdown."""
    return '\n\n'.join([_results(report), _notes(report), _provenance(report)])


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


def _results(report: Report) -> str:
    options, rows = report.options, report.rows
    fields = list(rows[0].values)
    compared, timed = bool(report.baselines), report.timed
    head = [*fields, 'parameters', f'{options.split} {options.metric}']
    if compared:
        head += ['difference', 'p', 'p (Holm)']
    head += ['tokens/s'] * timed
    if compared:
        head += ['tokens to its loss'] + ['time to its loss'] * timed
    lines = []
    for row in rows:
        line = [*(shown(value) for value in row.values.values()), _parameters(row), str(row.mean)]
        if compared:
            line.append('baseline' if row.values in report.baselines else str(row.against or '-'))
            line += [_p(row.against and row.against.p), _p(row.holm)]
        line += ['-' if row.speed is None else f'{row.speed:,.0f}'] * timed
        if compared:
            line.append('-' if row.reached is None else _tokens(row.reached[0]))
            line += ['-' if row.reached is None else _seconds(row.reached[1])] * timed
        lines.append(line)
    return markdown([head, *lines], numbers=len(fields))


def _notes(report: Report) -> str:
    sigma, options, timed = report.sigma, report.options, report.timed
    notes = ['A cell is the mean over n seeds ± half the width of its 95 % interval (Student t).']
    if sigma.value is None:
        notes.append('With one seed a row, nothing here says how far chance goes.')
    else:
        notes.append(
            f'Standard deviation between seeds: {sigma.value:.4f}, over all rows, {sigma.degrees} degrees of freedom.'
        )
    if report.baselines:
        notes.append(
            f'Differences are to the row {options.against}, seed by seed (the same seed sees the same batches in the '
            'same order), p by the two-sided paired t test; p (Holm) is corrected for all comparisons of the table. '
            f"Tokens{' and time' * timed} to the baseline's last loss are read between evaluations of one run whose "
            f'learning rate goes on falling{"; time is that of training steps alone" * timed}.'
        )
    judges = {row.against.judge for row in report.rows if row.against}
    if Judge.RESIDUAL in judges:
        notes.append(
            'Where n is 2, interval and p are by the standard deviation that the effects of rows and seeds leave over '
            f'in the whole table, taken to be the same in all rows (randomized blocks): {report.residual.value:.4f}, '
            f'{report.residual.degrees} degrees of freedom.'
        )
    if Judge.MEANS in judges:
        notes.append(
            'Where n says two numbers, a row and its baseline share fewer than two seeds: their means are compared, '
            'interval and p by the standard deviation between seeds over all rows, taken to be the same in these two.'
        )
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
        told = [
            f'{", ".join(shown(value) for value in row.values.values())} ({lowest:.3f} at {_tokens(tokens)} tokens, '
            f'{last:.3f} at the end)'
            for row, tokens, lowest, last in found[:MOST_TOLD]
        ]
        more = f' and {len(found) - MOST_TOLD} more' if len(found) > MOST_TOLD else ''
        notes.append(
            f'The {options.split} loss was lower before the end, by {WORSE} nats or more, in {"; ".join(told)}{more}.'
        )
    if options.allow:
        notes.append(f'The runs differ in {" and ".join(options.allow)}.')
    return '\n'.join(_bullet(note) for note in notes)


def _provenance(report: Report) -> str:
    """A line for each row, and before it what all rows have in common."""
    columns = ('config', 'commit', 'device', 'tokens', 'tokenizer', 'data')
    lines = [
        [', '.join(shown(value) for value in row.values.values()), *(_origin(row)[name] for name in columns)]
        for row in report.rows
    ]
    common, own = [], [0]
    for number, name in enumerate(columns, 1):
        texts = {line[number] for line in lines}
        if len(texts) == 1:
            common.append(f'{name} {texts.pop()}')
        else:
            own.append(number)
    head = ['row', *columns]
    shared = f'All rows: {", ".join(common)}.\n\n' if common else ''
    commands = dict.fromkeys(next(iter(row.runs.values())).facts['command'] for row in report.rows)
    told = '\n'.join(f'    {command}' for command in commands if command)
    text = shared + markdown([[line[number] for number in own] for line in (head, *lines)], numbers=len(own))
    return f'{text}\n\nCommands, one seed of each row:\n\n{told}' if told else text


def _origin(row: Row) -> dict[str, str]:
    runs = list(row.runs.values())
    commits = dict.fromkeys(commit for run in runs for commit in run.facts['commits'])
    data = dict.fromkeys(f'{source} ({identity})' for run in runs for source, identity in run.facts['data'].items())
    return {
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
    # A field's name is not cut at its hyphens, nor is a long one.
    cut = {'break_long_words': False, 'break_on_hyphens': False}
    return textwrap.fill(note, WIDTH, initial_indent='- ', subsequent_indent='  ', **cut)


def _parameters(row: Row) -> str:
    found = sorted({run.facts['parameters'] for run in row.runs.values()})
    return ' '.join(f'{number / 1e6:.2f} M' for number in found)


def _p(p: float | None) -> str:
    if p is None:
        return '-'
    return f'{p:.3f}' if p >= 0.001 else f'{p:.1e}'


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
