"""Which files a list of globs means: each one once, however many names and ways lead to it."""

import functools
import glob
import os
from collections.abc import Iterator

from gau.errors import UserError


def expand(globs: str) -> list[str]:
    """Returns the names of all files that match comma separated globs, sorted within each glob.

    A file counts once, by its real path, under the first of its names; a directory is entered once, so links that lead
    in a circle end. `**` descends, through links as well. A name with brackets or commas in it needs no escape unless
    it means something else as a glob.

    Raises:
      UserError: a glob that matches no file.
    """
    names: dict[str, str] = {}
    real_folder = functools.cache(os.path.realpath)
    for pattern in split(globs):
        found = sorted(_files(pattern))
        if not found:
            hint = (
                f', which is a directory: say which files, as in "{pattern}/**/*.txt"' if os.path.isdir(pattern) else ''
            )
            raise UserError(f'data: no file matches "{pattern}"{hint}')
        for name in found:
            folder, file = os.path.split(name)
            real = os.path.realpath(name) if os.path.islink(name) else os.path.join(real_folder(folder), file)
            names.setdefault(real, name)
    return list(names.values())


def split(globs: str) -> list[str]:
    """Returns the globs of a comma separated list; a comma may be part of a name, if there is a file of that name."""
    parts, patterns = globs.split(','), []
    while len(parts) > 1:
        ends = (end for end in range(1, len(parts) + 1) if _files(','.join(parts[:end])))
        end = next(ends, 1)
        patterns.append(','.join(parts[:end]))
        del parts[:end]
    return patterns + parts


def _files(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    for reading in (pattern, pattern.replace('[', '[[]')):
        if found := [name for name in _matches(reading) if os.path.isfile(name)]:
            return found
    return []


def _matches(pattern: str) -> Iterator[str]:
    """Yields what matches, as glob.glob does, but enters no directory twice below a `**`."""
    if pattern.endswith('/**'):
        pattern += '/*'
    before, stars, after = f'/{pattern}'.partition('/**/')
    if not stars:
        yield from glob.iglob(pattern)
        return
    before = before.removeprefix('/') or ('/' if pattern.startswith('/') else '')
    for top in glob.glob(before) if before else ['']:
        for folder in _folders(top):
            yield from _matches(os.path.join(glob.escape(folder), after or '*'))


def _folders(top: str) -> Iterator[str]:
    """Yields a directory and all below it that are not hidden, level by level, each real one once."""
    waiting, seen = [top], set()
    while waiting:
        level, waiting = waiting, []
        for folder in level:
            real = os.path.realpath(folder or os.curdir)
            if real in seen or not os.path.isdir(real):
                continue
            seen.add(real)
            yield folder
            try:
                with os.scandir(folder or os.curdir) as entries:
                    below = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith('.'))
            except OSError:  # as glob: what may not be read has no files
                below = []
            waiting += [os.path.join(folder, name) for name in below]
