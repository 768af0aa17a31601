"""Text and JSON-lines files as documents by index, without holding the text.

Each file is scanned once for where its documents begin and end; what stays in memory is two int64 numbers a document,
and for large files not even those (the index is kept in the cache directory and memory-mapped). Compressed files cannot
be entered in the middle, so they are decompressed once into the cache directory, under a name that changes with the
file's size or date; the global shuffle and the exact resume then work as for plain files.
"""

import codecs
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from gau.data import globs as file_globs
from gau.data import plain
from gau.data.documents import Document, nested
from gau.errors import UserError, warn

_BLOCK = 1 << 24
# Larger files keep their index in the cache directory.
_LARGE = 1 << 26
# A document is tokenized whole, so one this long costs more than a gigabyte for a moment.
_LONGEST_DOCUMENT = 1 << 26
# What is read of how many files to tell whether they are the same at another place.
_SAMPLE, _SAMPLED_FILES = 1 << 16, 64
_BOM = codecs.BOM_UTF8
_LEAVE_OUT = 'data.bad_lines="skip" leaves such documents out'
_NUL = 'a NUL byte, which text has none of'


class TextFiles:
    """The documents of all files that match some globs, in the order of their names.

    Args:
      globs: comma separated globs; `**` descends.
      unit: `file`, `line`, `paragraph`, or `json` for a JSON object a line.
      field: of the JSON object, for `json`.
      bad: `error`, or `skip` with a count: what to do with a document that is no UTF-8, no JSON or lacks the field.
      cache_dir: see the data config.

    Raises:
      UserError: no, empty, unreadable or broken files; under `bad="error"` with file and line.
    """

    def __init__(self, globs: str, *, unit: str, field: str | None, bad: str, cache_dir: str | None) -> None:
        self._unit, self._field, self._bad = unit, field, bad
        self._cache = pathlib.Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._names = file_globs.expand(globs)
        self._paths = [plain.plain(name, self._cache) for name in self._names]
        self._spans = [self._index(name, path) for name, path in zip(self._names, self._paths, strict=True)]
        self._ends = np.cumsum([len(spans) for spans in self._spans])
        self.skipped: set[int] = set()
        self._lock = threading.Lock()
        if not len(self):
            raise UserError(f'{globs}: no document in {len(self._names)} files, all of them are empty')
        for name, path in zip(self._names, self._paths, strict=True):
            if not path.stat().st_size:
                warn(f'{name}: the file is empty')
        # A misnamed field shows in the first documents: say so now, not in the middle of an epoch.
        for first in [0, *self._ends[:-1]][:100]:
            if first < len(self):
                self[first]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document | None:
        number = int(np.searchsorted(self._ends, index, side='right'))
        local = index - (int(self._ends[number - 1]) if number else 0)
        start, end = (int(offset) for offset in self._spans[number][local])
        with open(self._paths[number], 'rb') as file:
            file.seek(start)
            raw = file.read(end - start)

        def place() -> str:
            return f'{self._names[number]}:{_line_number(self._paths[number], start)}'

        try:
            text, record = self._parse(raw)
        except ValueError as error:
            if self._bad == 'error':
                raise UserError(f'{place()}: {error}; {_LEAVE_OUT}') from error
            self._count(index, f'{place()}: {error}')
            return None
        # A blank document would only teach to stop at once.
        return Document(text=text, record=record, place=place) if text and not text.isspace() else None

    def size(self, index: int) -> int:
        """Returns the bytes that document `index` takes in its file, without reading it."""
        number = int(np.searchsorted(self._ends, index, side='right'))
        start, end = self._spans[number][index - (int(self._ends[number - 1]) if number else 0)]
        return int(end - start)

    def _parse(self, raw: bytes) -> tuple[str, dict[str, Any] | None]:
        """Returns the text, and the JSON object that it is a field of; raises ValueError saying what is wrong."""
        try:
            text = raw.decode('utf-8')
        except UnicodeDecodeError as error:
            raise ValueError(f'not UTF-8: {error.reason} (byte 0x{raw[error.start]:02x})') from error
        if b'\0' in raw:
            raise ValueError(_NUL)
        if self._unit == 'line':
            return text.removesuffix('\r'), None
        if self._unit != 'json' or not text.strip():
            return text, None
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f'not JSON, of which one object a line is expected: {error}') from error
        if not isinstance(record, dict):
            raise ValueError(f'one JSON object a line is expected, not {type(record).__name__}')
        try:
            value = nested(record, self._field)
        except KeyError as error:
            raise ValueError(
                f'no field "{self._field}" (data.text_field) among {", ".join(sorted(record)) or "none"}'
            ) from error
        if not isinstance(value, str):
            raise ValueError(f'the field "{self._field}" is {type(value).__name__}, not text')
        return value, record

    def _count(self, index: int, message: str) -> None:
        with self._lock:
            new = index not in self.skipped
            self.skipped.add(index)
            count = len(self.skipped)
        # At 1, 2, 4, 8, ...: every one would drown the log of a bad file.
        if new and count & (count - 1) == 0:
            warn(f'{message}: skipped, {count} so far')

    def _index(self, name: str, path: pathlib.Path) -> np.ndarray:
        """Returns where the documents of a file begin and end, int64 [documents, 2]."""
        try:
            size = path.stat().st_size
            if size == 0:
                return np.zeros((0, 2), np.int64)
            plain.check_text(name, path)
            if size < _LARGE:
                return self._scan(name, path)
            kept = self._cache / f'{plain.key(path)}-{self._unit}-{self._bad}.npy'
            if not kept.exists():
                spans = self._scan(name, path)
                plain.write_atomically(kept, lambda file: np.save(file, spans))
            return np.load(kept, mmap_mode='r')
        except OSError as error:
            raise UserError(f'{error.filename or name}: {error.strerror or error}') from error

    def _scan(self, name: str, path: pathlib.Path) -> np.ndarray:
        if self._bad == 'error':
            _check_bytes(name, path)
        with open(path, 'rb') as file:
            start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        if self._unit == 'file':
            size = path.stat().st_size
            if size > _LONGEST_DOCUMENT:
                raise UserError(
                    f'{name}: {size / 2**20:.0f} MiB are too long for one document; '
                    'choose data.text_unit="paragraph" or "line"'
                )
            return np.array([[start, size]], np.int64)
        if self._unit == 'paragraph':
            return np.fromiter(_paragraphs(path, start), np.dtype((np.int64, 2)))
        return _lines(path, start)


def identity(globs: str) -> list[list[str | int]]:
    """Returns name, size and modification time (ns) of every file that matches: equal means the same documents."""
    return [
        [name, status.st_size, status.st_mtime_ns] for name in file_globs.expand(globs) for status in [os.stat(name)]
    ]


def contents(globs: str) -> str:
    """Returns a hash of the files that match, in their order: last part of the name, size, and samples of some."""
    names = file_globs.expand(globs)
    digest = hashlib.sha256()
    sampled = {names[i] for i in np.unique(np.linspace(0, len(names) - 1, _SAMPLED_FILES).astype(int))}
    for name in names:
        size = os.stat(name).st_size
        digest.update(f'{os.path.basename(name)}|{size}|'.encode())
        if name in sampled:
            with open(name, 'rb') as file:
                for start in (0, max(size - _SAMPLE, 0)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def default_cache_dir() -> pathlib.Path:
    """Returns $XDG_CACHE_HOME/gau, or ~/.cache/gau."""
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'gau'


def _check_bytes(name: str, path: pathlib.Path) -> None:
    """Raises UserError with the line of the first byte that is no text in UTF-8."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    before = 0
    with open(path, 'rb') as file:
        while True:
            block = file.read(_BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.object begins with what the decoder kept of the block before.
                offset = before + len(block) - len(error.object) + error.start
                where = f'{name}:{_line_number(path, offset)}'
                raise UserError(
                    f'{where}: not UTF-8: {error.reason} (byte 0x{error.object[error.start]:02x}); {_LEAVE_OUT}'
                ) from error
            if (offset := block.find(0)) >= 0:
                raise UserError(f'{name}:{_line_number(path, before + offset)}: {_NUL}; {_LEAVE_OUT}')
            if not block:
                return
            before += len(block)


def _lines(path: pathlib.Path, start: int) -> np.ndarray:
    """Returns the span of every line that is not empty, without its newline."""
    ends, base = [], 0
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord('\n')) + base)
            base += len(block)
    ends = np.concatenate([*ends, [base]])
    starts = np.concatenate([[start], ends[:-1] + 1])
    return np.stack([starts, ends], axis=1)[ends > starts].astype(np.int64)


def _paragraphs(path: pathlib.Path, start: int) -> Iterator[tuple[int, int]]:
    """Yields the span of every run of lines that are not blank."""
    begin, end, offset = None, 0, start
    with open(path, 'rb') as file:
        file.seek(start)
        for line in file:
            if line.isspace():
                if begin is not None:
                    yield begin, end
                begin = None
            else:
                begin = offset if begin is None else begin
                end = offset + len(line.rstrip(b'\r\n'))
            offset += len(line)
    if begin is not None:
        yield begin, end


def _line_number(path: pathlib.Path, offset: int) -> int:
    """Returns the number of the line, from 1, in which the byte at `offset` stands."""
    number = 1
    with open(path, 'rb') as file:
        while offset > 0 and (block := file.read(min(_BLOCK, offset))):
            number += block.count(b'\n')
            offset -= len(block)
    return number
