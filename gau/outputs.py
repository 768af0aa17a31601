"""Files and directories that commands make: known to be writable before the work, and never over something else."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gau.errors import UserError


def check_file(path: Path, *, flag: str) -> None:
    """Makes the directory of a file that a flag names.

    Raises:
      UserError: the file cannot be written.
    """
    with _told(path, flag):
        if path.is_dir():
            raise _os_error(errno.EISDIR)
        if path.exists():
            _check_access(path)
        else:
            check_writable_directory(path.parent)


def check_writable_directory(path: Path) -> None:
    """Makes a directory to write files into, if there is none yet. Raises OSError if it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        # It exists, and so is no directory.
        raise _os_error(errno.ENOTDIR) from None
    _check_access(path)


def check_directory(path: Path, *, flag: str = 'output') -> None:
    """Finds out whether `directory` can make one, and makes those that it lies in.

    Raises:
      UserError: there is something already, but for an empty directory; or it cannot be written.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f'--{flag}={path} exists already: choose another directory')
    with _told(path, flag):
        check_writable_directory(path.parent)


@contextmanager
def directory(path: Path, *, flag: str = 'output') -> Iterator[Path]:
    """Yields a directory to fill, which is at `path` in the end; if filling it fails, nothing is.

    Raises:
      UserError: as `check_directory`.
    """
    check_directory(path, flag=flag)
    with _told(path, flag):
        aside = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield aside
        aside.chmod(0o755)
        if path.exists():
            path.rmdir()
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _told(path: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'--{flag}={path} cannot be written: {error.strerror}') from error


def _check_access(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise _os_error(errno.EACCES)


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
