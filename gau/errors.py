"""The one error a user can mend, the hint that helps to mend it, and warnings."""

import difflib
import functools
import multiprocessing
import sys
from collections.abc import Iterable


class UserError(Exception):
    """Bad usage, config or data: entry points print it as one line on stderr and exit with code 2."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns '; did you mean "x"?' for the option nearest to `name`, or a list of all options if none is near."""
    options = sorted(str(option) for option in options)
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else f'; choose from {", ".join(options)}'


def check_name(field: str, value: str, options: tuple[str, ...]) -> None:
    """Raises a UserError with the nearest right name if `value` is none of `options`."""
    if value not in options:
        raise UserError(f'{field}="{value}" is unknown{did_you_mean(value, options)}')


@functools.cache
def warn(message: str) -> None:
    """Prints one line on stderr, once; the processes that a script has started leave that to the script."""
    if multiprocessing.parent_process() is None:
        print(f'warning: {message}', file=sys.stderr)
