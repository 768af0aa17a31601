"""The one error a user can mend, the hint that helps to mend it, and warnings."""

import difflib
import errno
import functools
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator

# Options that one line of an error lists.
MOST_OPTIONS = 30
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad usage, config or data: entry points print it as one line on stderr and exit with code 2."""


class RunFailed(Exception):
    """What no change of the command mends, said in one line: entry points print it on stderr and exit with code 1."""


class NoSpace(RunFailed):
    """The file system, or a quota, is full."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_no_space(error: BaseException) -> bool:
    """Returns whether an exception came from a full file system or quota; Orbax wraps such errors in its own."""
    texts = tuple(os.strerror(number) for number in _NO_SPACE)
    return any(
        getattr(cause, 'errno', None) in _NO_SPACE or any(text in str(cause) for text in texts)
        for cause in chain(error)
    )


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns '; did you mean "x"?' for the option nearest to `name`, or a list of options if none is near.

    Of more options than a line holds, the list has the nearest.
    """
    options = sorted(str(option) for option in options)
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    if len(options) > MOST_OPTIONS:
        nearest = difflib.get_close_matches(str(name), options, n=5, cutoff=0)
        return f'; of {len(options)} the nearest are {", ".join(nearest)}'
    return f'; choose from {", ".join(options)}'


def check_name(field: str, value: str, options: tuple[str, ...]) -> None:
    """Raises a UserError with the nearest right name if `value` is none of `options`."""
    if value not in options:
        raise UserError(f'{field}="{value}" is unknown{did_you_mean(value, options)}')


@functools.cache
def warn(message: str) -> None:
    """Prints one line on stderr, once; the processes that a script has started leave that to the script."""
    if multiprocessing.parent_process() is None:
        print(f'warning: {message}', file=sys.stderr)
