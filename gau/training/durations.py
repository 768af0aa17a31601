"""Durations in any unit: a field such as `warmup_` stands as `warmup_steps`, `_tokens`, `_epochs` or `_percent`."""

import math
import re
from collections.abc import Callable, Collection

from ml_collections import ConfigDict

from gau.errors import UserError

UNITS = ('steps', 'tokens', 'epochs', 'percent')
# No run is longer, and of infinity and NaN no number of steps can be made.
_LONGEST = 1e18
_UNIT_FIELD = re.compile(rf'(?P<stem>.*?)(?P<unit>{"|".join(UNITS)})')


def given_unit(section: ConfigDict, stem: str, *, where: str, units: tuple[str, ...] = UNITS) -> str:
    """Returns the one unit in which `section` states the duration `stem`.

    Raises:
      UserError: none or several of the units are given, or the number is not positive.
    """
    given = [unit for unit in units if section.get(stem + unit) is not None]
    if len(given) != 1:
        fields = ', '.join(f'{where}{stem}{unit}' for unit in units)
        found = ' and '.join(f'{where}{stem}{unit}' for unit in given) or 'none'
        raise UserError(f'exactly one of {fields} must be given, found {found}')
    value = section[stem + given[0]]
    if value < 0:
        raise UserError(f'{where}{stem}{given[0]}={value}: a duration cannot be negative')
    if not value < _LONGEST:
        raise UserError(f'{where}{stem}{given[0]}={value}: want a number below {_LONGEST:g}')
    return given[0]


def is_duration(path: str) -> bool:
    """Returns whether a config field, by its dotted path, is a duration in one of the units."""
    return _UNIT_FIELD.fullmatch(path.rpartition('.')[2]) is not None


def keep_given_units(config: ConfigDict, given: Collection[str]) -> None:
    """Empties the other units of every duration among the fields that were given (by dotted path), in place.

    A duration stands in one unit only: `tokens` of a command line takes the place of the config's own `steps`.
    """
    for path in sorted(given):
        *parents, field = path.split('.')
        match = _UNIT_FIELD.fullmatch(field)
        if not match:
            continue
        section = config
        for parent in parents:
            section = section[parent]
        for unit in UNITS:
            sibling = match['stem'] + unit
            if sibling != field and sibling in section and '.'.join([*parents, sibling]) not in given:
                section[sibling] = None


def in_steps(
    section: ConfigDict,
    stem: str = '',
    *,
    where: str = '',
    tokens_per_step: int,
    tokens_per_epoch: Callable[[], int],
    total_steps: int | None = None,
) -> int:
    """Converts the duration `stem` of a config section into steps, rounded up.

    Args:
      section: config holding `{stem}steps`, `{stem}tokens`, ...; exactly one of them not None.
      stem: what precedes the unit, e.g. `warmup_`.
      where: the section's own path with a trailing dot, for error messages.
      tokens_per_step: tokens in one global batch.
      tokens_per_epoch: called only when the unit is epochs, since counting may need a pass over the data.
      total_steps: length of the run, the base of `percent`; None forbids that unit.

    Raises:
      UserError: see `given_unit`.
    """
    units = UNITS if total_steps is not None else UNITS[:-1]
    unit = given_unit(section, stem, where=where, units=units)
    value = section[stem + unit]
    if unit == 'steps':
        return int(value)
    if unit == 'tokens':
        return math.ceil(value / tokens_per_step)
    if unit == 'epochs':
        return _rounded_up(value * tokens_per_epoch() / tokens_per_step)
    return _rounded_up(value / 100 * total_steps)


def _rounded_up(steps: float) -> int:
    # Not for what floats add: 7 / 100 * 100 is a little more than 7.
    return math.ceil(round(steps, 6))
