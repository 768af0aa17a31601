"""A corpus that every machine with Python already has: the documentation and source of its own standard library.

The same on every run of one Python version. Left out is whatever varies between machines with that version: packages
that Linux distributions ship separately, build configuration, site hooks; and the character tables of `encodings`,
which are no text. Documents are split by name, not at random: the held-out ones never change.
"""

import functools
import hashlib
import os
import pathlib
import platform
import sysconfig
import zlib

_LEFT_OUT = {
    'site-packages', 'dist-packages', '__pycache__', 'lib-dynload', 'encodings', 'pydoc_data',
    'test', 'tests', 'idlelib', 'tkinter', 'turtledemo', 'lib2to3', 'distutils', 'ensurepip', 'venv', '__phello__',
    'turtle.py', 'site.py', 'sitecustomize.py', 'usercustomize.py', '_sysconfigdata.py',
}  # fmt: skip
# The last is Debian's.
_LEFT_OUT_PREFIXES = ('_sysconfigdata', 'config-', 'plat-', '_distutils')
# One name in 22 is held out: some 400 kB of 9 MB.
_VALID_ONE_IN = 22
SPLITS = ('train', 'valid')


def split_text(split: str) -> list[tuple[str, str]]:
    """Returns the (name, text) documents of `split`, `train` or `valid`, sorted by name."""
    return [(name, text) for name, text in _documents() if _split_of(name) == split]


def kind(name: str) -> str:
    """Returns what a document is: `topic` (documentation), or a module `in a package` or `on its own`."""
    if name.startswith('topics/'):
        return 'topic'
    return 'in a package' if '/' in name else 'on its own'


def identity() -> str:
    """Returns the version of Python and a hash of all documents."""
    digest = hashlib.sha256()
    for name, text in _documents():
        digest.update(f'{name}|{len(text)}|{text}'.encode('utf-8', errors='replace'))
    return f'Python {platform.python_version()}, {digest.hexdigest()[:16]}'


def _split_of(name: str) -> str:
    # crc32 stays the same in every Python, unlike hash().
    return 'valid' if zlib.crc32(name.encode()) % _VALID_ONE_IN == 0 else 'train'


@functools.cache
def _documents() -> tuple[tuple[str, str], ...]:
    documents = [(f'topics/{name}', text) for name, text in _topics().items()]
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _left_out(name)]
        for file in files:
            path = pathlib.Path(folder, file)
            if path.suffix != '.py' or _left_out(file):
                continue
            try:
                text = path.read_text(encoding='utf-8')
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                documents.append((path.relative_to(root).as_posix(), text))
    return tuple(sorted(documents))


def _left_out(name: str) -> bool:
    return name in _LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a distribution without it still has the sources
        return {}
    return topics
