"""What a sweep would run, in text: its points and all that each changes, what they cost, whether they would compile."""

import json
import math
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gau.errors import UserError, did_you_mean
from gau.experiments.cost import Cost, cost
from gau.experiments.directory import ROOT
from gau.experiments.runner import DIVERGED, FAILED, FINISHED, KEPT, Task
from gau.experiments.sweep import Point, Program, changes
from gau.training.config import flatten

if TYPE_CHECKING:
    from gau.experiments.kept import Missing


# Columns of a terminal that lines of words fill.
WIDTH = 100
# Stands for a space at which a line is not broken.
_UNBROKEN = '\xa0'
# The columns of `_size`. Passes are over the training text, of a mixture over the source that is read most often.
_SIZE = ('steps', 'tokens', 'passes', 'FLOPs')


def describe(program: Program, points: Sequence[Point], kept: Mapping[str, Path] | None = None) -> str:
    """Returns the points by number: what each sets, what changes with it, which are kept and which ones are refused.

    Changes are told against the program's own config, or, if that one is refused, against the first accepted point;
    those of several seeds once.

    Args:
      program: that the points are of.
      points: all of them.
      kept: where the finished run of a point is kept, by its name.
    """
    kept = kept or {}
    try:
        base, against = program.config({}), 'the config without a sweep'
    except UserError:
        first = next(point for point in points if point.config is not None)
        base, against = first.config, first.name
    flat = flatten(base.to_dict())
    count = f'{len(points)} point{"s" * (len(points) > 1)}'
    lines = [f'{count}; changes against {against}:']
    told: dict[tuple[str, ...], int] = {}
    for number, point in enumerate(points):
        head = f'{number:>3}  {point.name}' + (f'  KEPT in {kept[point.name]}' if point.name in kept else '')
        lines.append(_wrapped(f'{head}  {_what(number, point, flat, told)}'))
    return '\n'.join(lines)


def _what(number: int, point: Point, base: Mapping[str, Any], told: dict[tuple[str, ...], int]) -> str:
    """Returns what a point is against a flat config; `told` has the numbers of points by what was said of them."""
    own, followed = changes(point, base) if point.config is not None else ([point.error], [])
    without_seed = tuple(change for change in (*own, *followed) if not change.startswith('seed: '))
    first = told.setdefault(without_seed, number)
    if point.config is None:
        return f'REFUSED: {point.error}' if first == number else f'REFUSED as point {first}'
    if first != number:
        return f'as point {first}, another seed'
    if not own and not followed:
        return 'as it is'
    arguments = [f'{name}={value}' for name, value in point.overrides.items() if name.startswith(':')]
    own, followed = ([change.replace(' ', _UNBROKEN) for change in each] for each in (arguments + own, followed))
    text = ', '.join(own) or 'no field by itself'
    return f'{text}; with it {", ".join(followed)}' if followed else text


def _wrapped(line: str) -> str:
    text = textwrap.fill(line, WIDTH, subsequent_indent=7 * ' ', break_long_words=False, break_on_hyphens=False)
    return text.replace(_UNBROKEN, ' ')


def costs(
    points: Sequence[Point],
    *,
    chip: str,
    utilisation: float,
    vocab_size: int | None = None,
    done: Mapping[str, str] | None = None,
    only: int | None = None,
) -> str:
    """Returns a table of the points with parameters, tokens, FLOPs of training, and hours on a chip.

    How often the training text is passed over stands beside the tokens where the data are prepared.

    Args:
      points: all of the sweep, for their numbers; those that are refused are left out.
      chip: a name of `gau.training.throughput.PEAK_FLOPS`; `TPU ` may be left out.
      utilisation: share of the chip's peak that training is taken to reach.
      vocab_size: to count with; None: each point's tokenizer's.
      done: how a point is done already (`finished`, `kept`, `diverged`), by name: it costs nothing any more.
      only: the number of the one point that the table is about; None: all.

    Raises:
      UserError: an unknown chip.
    """
    chip, peak = _chip(chip)
    rows = [['', 'point', 'parameters', *_SIZE, 'hours']]
    hours = []
    for number, point in enumerate(points):
        if point.config is None or only not in (None, number):
            continue
        found = cost(point.config, vocab_size=vocab_size)
        last = (done or {}).get(point.name)
        if last is None:
            hours.append(found.hours(peak, utilisation))
            last = _in_hours(hours[-1])
        rows.append([str(number), point.name, f'{found.parameters:,}', *_size(found), last])
    what = f'point {only}' if only is not None else 'what is left' if done else 'all'
    total = f'{what}: {_hours(hours, chip, peak, utilisation)}'
    return f'{aligned(_without_idle(rows))}\n{total}'


def missing(
    tables: Mapping[str, Sequence[Point]],
    missed: Sequence['Missing'],
    *,
    chip: str,
    utilisation: float,
    vocab_size: int | None = None,
) -> str:
    """Returns the runs that are missing from tables with what they cost, and below them how many each table lacks.

    A line is a point with its missing seeds: hours are of all of them, steps, tokens and FLOPs of one run.

    Args:
      tables: all their points, by name.
      missed: what is not kept of them.
      chip, utilisation, vocab_size: see `costs`.

    Raises:
      UserError: an unknown chip.
    """
    chip, peak = _chip(chip)
    rows = [['table', 'point', 'seeds', *_SIZE, 'hours, all seeds', 'also of']]
    seeds: dict[tuple, list[Point]] = {}
    for point, asking in missed:
        seeds.setdefault((*asking, point.label), []).append(point)
    hours = []
    for (table, *others, label), own in seeds.items():
        found = cost(own[0].config, vocab_size=vocab_size)
        one = found.hours(peak, utilisation)
        hours += [one] * len(own)
        names = ' '.join(str(point.config.seed) for point in own)
        rows.append([table, label, names, *_size(found), _in_hours(one and one * len(own)), ', '.join(others)])
    lacking = Counter(table for one in missed for table in one.tables)
    sizes = {table: sum(point.config is not None for point in points) for table, points in tables.items()}
    counts = [['table', 'points', 'kept', 'missing']]
    counts += [[table, str(size), str(size - lacking[table]), str(lacking[table])] for table, size in sizes.items()]
    if len(tables) > 1:
        size, lack = sum(sizes.values()), sum(lacking.values())
        counts.append(['all', str(size), str(size - lack), str(lack)])
    total = f'{len(missed)} different runs are missing: {_hours(hours, chip, peak, utilisation)}'
    rows = _without_idle(rows)
    left = [place for place, name in enumerate(rows[0]) if name in ('table', 'point', 'seeds', 'also of')]
    listed = aligned(rows, left=left) + '\n\n' if missed else ''
    return f'{listed}{aligned(counts, left=(0,))}\n\n{total}'


def _chip(name: str) -> tuple[str, float]:
    """Returns the full name of a chip and its peak in FLOP/s."""
    # Imported late: it imports JAX.
    from gau.training.throughput import PEAK_FLOPS

    aliases = {full.removeprefix('TPU ').replace(' lite', 'e'): full for full in PEAK_FLOPS}
    full = aliases.get(name, name)
    if full not in PEAK_FLOPS:
        raise UserError(f'--chip={name} is unknown{did_you_mean(name, PEAK_FLOPS)}')
    return full, PEAK_FLOPS[full]


def _size(found: Cost) -> list[str]:
    passes = str(found.passes or '-')
    return [_or_dash(found.steps, ',d'), _or_dash(found.tokens, ',d'), passes, _or_dash(found.flops, '.3g')]


def _without_idle(rows: list[list[str]]) -> list[list[str]]:
    """Returns a table, with its head, without `passes` and `also of` where no row has any."""
    columns = [c for c in zip(*rows, strict=True) if c[0] not in ('passes', 'also of') or set(c[1:]) - {'-', ''}]
    return [list(row) for row in zip(*columns, strict=True)]


def _hours(hours: Sequence[float | None], chip: str, peak: float, utilisation: float) -> str:
    known = [value for value in hours if value is not None]
    if hours and not known:
        return 'hours are not known, for only the data can count epochs'
    total = f'{_in_hours(sum(known))} hours on one {chip} at {utilisation:.0%} of its {peak / 1e12:,.0f} TFLOP/s'
    if len(known) < len(hours):
        total += f', without {len(hours) - len(known)} points whose epochs only the data can count'
    return f'{total}, training steps alone'


def _in_hours(hours: float | None) -> str:
    return '<0.001' if hours is not None and 0 < hours < 1e-3 else _or_dash(hours, '.3g')


def weights(points: Sequence[Point]) -> dict[str, float]:
    """Returns what each point costs by name, in FLOPs, for the time left; all alike if one is not known."""
    found = {point.name: cost(point.config).flops for point in points}
    return found if all(found.values()) else dict.fromkeys(found, 1.0)


def compile_check(program: Program, points: Sequence[Point], topology: str, *, vocab_size: int | None = None) -> int:
    """Prints whether the training step of each point compiles for a topology and fits; returns 1 if one does not.

    Each is compiled in a process of scripts/compile_check.py: JAX can be set up for one machine only. By default it has
    the vocabulary of its tokenizer.
    """
    fit = True
    for point in points:
        vocabulary = vocab_size or _vocab_size(point)
        with tempfile.TemporaryDirectory() as directory:
            kept = Path(directory) / 'row.jsonl'
            done = subprocess.run(
                [
                    *(sys.executable, str(ROOT / 'scripts' / 'compile_check.py')),
                    *program.arguments(point.overrides),
                    *(f'--topology={topology}', f'--vocab_size={vocabulary}', f'--json={kept}'),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode == 2:
                raise UserError(done.stderr.strip().removeprefix('error: '))
            row = json.loads(kept.read_text()) if kept.is_file() else {}
        fits = row.get('fits')
        fit = fit and done.returncode == 0 and fits is not False
        print(f'{point.name}  {_verdict(row, done)}', flush=True)
    return 0 if fit else 1


def outcome(tasks: Sequence[Task], *, refused: int) -> str:
    """Returns what became of the points, in a line, and below it why some have failed, and when diverged."""
    states = Counter(task.state for task in tasks)
    finished = states[FINISHED] + states[KEPT]
    parts = [
        f'finished: {finished} of {len(tasks)} points' + f', {states[KEPT]} of them kept runs' * (states[KEPT] > 0)
    ]
    parts += [f'{state}: {states[state]}' for state in (DIVERGED, FAILED) if states[state]]
    parts += [f'refused: {refused}'] * (refused > 0)
    parts += ['the same command goes on with the rest'] * (finished + states[FAILED] + states[DIVERGED] < len(tasks))
    lines = ['; '.join(parts)]
    for task in tasks:
        if task.state == FAILED:
            times = 'once' if task.attempts == 1 else f'{task.attempts} times'
            lines.append(f'{task.name} failed {times}, {task.error}')
        elif task.state == DIVERGED:
            lines.append(f'{task.name} diverged {task.error}')
    return '\n'.join(lines)


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (1,)) -> str:
    """Returns rows of cells in columns: those of names (`left`) to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _verdict(row: dict, done: subprocess.CompletedProcess) -> str:
    if done.returncode or not row:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f'could not be compiled: {lines[-1].strip() if lines else f"exit code {done.returncode}"}'
    if row.get('fits') is False:
        return f'does not fit: {row["error"]}' if 'error' in row else 'does not fit'
    used = f'{row["total_bytes"] / 2**30:.2f} GiB a device'
    if row.get('memory_bytes'):
        used += f' of {row["memory_bytes"] / 2**30:.2f}'
    devices = math.prod(row['mesh'].values())
    if devices < row['devices']:
        used += f', on {devices} of {row["devices"]} devices'
    speed = f', {1e3 * row["step_seconds"]:.1f} ms a step estimated' if 'step_seconds' in row else ''
    return f'{"fits" if row["fits"] else "compiles"}: {used}{speed}'


def _vocab_size(point: Point) -> int:
    from gau.data import tokenizers

    return tokenizers.load(point.config.data.tokenizer).vocab_size


def _or_dash(value: float | None, form: str) -> str:
    return '-' if value is None else format(value, form)
