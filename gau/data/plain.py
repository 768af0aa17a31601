"""The plain contents of a file: decompressed once into the cache directory, and refused if they are no text."""

import bz2
import codecs
import hashlib
import lzma
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from gau.errors import UserError, warn

# Compressed bytes at once: small, because a few of them may stand for thousands of times as many.
_BLOCK = 1 << 16
# As much as is looked at to tell text from other things; git does the same with as much.
_HEAD = 8000
# How a compressed stream begins, and an object that decompresses one.
_COMPRESSED = {
    '.gz': (b'\x1f\x8b', lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    '.bz2': (b'BZh', bz2.BZ2Decompressor),
    '.xz': (b'\xfd7zXZ\0', lzma.LZMADecompressor),
    '.zst': (b'\x28\xb5\x2f\xfd', lambda: _zstandard().ZstdDecompressor().decompressobj()),
}
# A frame of zstd that is to be passed over begins with one of 16 numbers.
_ZST_SKIPPED = tuple(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))
# How other files begin, what they are, and what to do with them. They count only where a NUL or invalid UTF-8 follows.
_OTHERS = (
    (codecs.BOM_UTF32_LE, 'text in UTF-32', 'convert it, as by iconv -f UTF-32 -t UTF-8'),
    (codecs.BOM_UTF32_BE, 'text in UTF-32', 'convert it, as by iconv -f UTF-32 -t UTF-8'),
    (codecs.BOM_UTF16_LE, 'text in UTF-16', 'convert it, as by iconv -f UTF-16 -t UTF-8'),
    (codecs.BOM_UTF16_BE, 'text in UTF-16', 'convert it, as by iconv -f UTF-16 -t UTF-8'),
    (b'PK\x03\x04', 'a zip archive', 'unpack it'),
    (b"7z\xbc\xaf'\x1c", 'a 7z archive', 'unpack it'),
    (b'Rar!\x1a\x07', 'a rar archive', 'unpack it'),
    (b'%PDF-', 'a PDF document', 'give its text'),
    (b'PAR1', 'a Parquet file', 'write its rows as JSON lines'),
    (b'ARROW1', 'an Arrow file', 'write its rows as JSON lines'),
    (b'SQLite format 3\0', 'an SQLite database', 'write its rows as JSON lines'),
    (b'\x93NUMPY', 'a NumPy array', 'give the text'),
    *((magic, 'a compressed file', f'call it *{suffix}') for suffix, (magic, _) in _COMPRESSED.items()),
)


def plain(name: str, cache: pathlib.Path) -> pathlib.Path:
    """Returns the path of the file's plain contents, decompressed into the directory `cache` if need be.

    Raises:
      UserError: damaged or cut short; the cache cannot be written.
    """
    path = pathlib.Path(name)
    suffix = path.suffix.lower()
    if suffix not in _COMPRESSED:
        return path
    # Earlier versions kept what there was of a .zst file cut short.
    kept = cache / f'{key(path)}-{"whole-" if suffix == ".zst" else ""}{path.stem}'
    if not kept.exists():
        write_atomically(kept, lambda out: out.writelines(_contents(name, path, suffix)))
    return kept


def _contents(name: str, path: pathlib.Path, suffix: str) -> Iterator[bytes]:
    try:
        with open(path, 'rb') as source:
            yield from _decompressed(name, source, suffix)
    except UserError as error:
        raise UserError(f'{name}: {error}') from error
    except Exception as error:  # every compression has its own error types
        raise UserError(f'{name}: cannot decompress: {error}') from error


def _decompressed(name: str, source: IO[bytes], suffix: str) -> Iterator[bytes]:
    """Yields the contents of all the streams of a compressed file; warns of bytes behind them that are none."""
    magic, new = _COMPRESSED[suffix]
    begins = (magic, *_ZST_SKIPPED) if suffix == '.zst' else (magic,)
    block = source.read(_BLOCK)
    while block:
        stream = new()
        yield stream.decompress(block)
        while not stream.eof:
            if not (block := source.read(_BLOCK)):
                raise UserError('cannot decompress: it ends in the middle; copy or download it again')
            yield stream.decompress(block)
        block = _past_padding(stream.unused_data, source)
        if block and not block.startswith(begins):
            rest = len(block) + sum(len(part) for part in iter(lambda: source.read(_BLOCK), b''))
            warn(f'{name}: {rest} bytes behind the compressed data are passed over')
            return


def _past_padding(block: bytes, source: IO[bytes]) -> bytes:
    """Returns what comes next behind zeros, at least the beginning of a stream; nothing at the file's end."""
    while not (block := block.lstrip(b'\0')):
        if not (block := source.read(_BLOCK)):
            return b''
    return block + source.read(8)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError('.zst needs the package zstandard: pip install zstandard') from error
    return zstandard


def read_text(path: str | os.PathLike[str]) -> str:
    """Returns a file's text as training reads it: line ends as they are, without a byte order mark.

    Raises:
      UserError: it cannot be read, or is no UTF-8.
    """
    try:
        check_text(str(path), pathlib.Path(path))
        return pathlib.Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode('utf-8')
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8: {error.reason} (byte 0x{error.object[error.start]:02x})') from error


def check_text(name: str, path: pathlib.Path) -> None:
    """Raises UserError, saying what it looks like, if the plain contents of the file `name` are no UTF-8 text.

    Only the beginning is looked at; a document that is not UTF-8 further on is up to `data.bad_lines`.
    """
    with open(path, 'rb') as file:
        head = file.read(_HEAD)
    found = _looks_like(head)
    if found is not None:
        what, instead = found
        raise UserError(f'{name}: no UTF-8 text, it looks like {what}: {instead}')


def _looks_like(head: bytes) -> tuple[str, str] | None:
    """Returns what the beginning of a file that is no text looks like, and what to do; None for text."""
    if b'\0' not in head and _is_utf8(head):
        return None
    if head[257:262] == b'ustar':
        return 'a tar archive', 'unpack it'
    for magic, what, instead in _OTHERS:
        if head.startswith(magic):
            return what, instead
    if b'\0' not in head:
        return None
    for name, zeros in (('UTF-16LE', head[1::2]), ('UTF-16BE', head[::2])):
        if 2 * zeros.count(0) > len(zeros):
            return f'text in {name}', f'convert it, as by iconv -f {name} -t UTF-8'
    return 'binary data (NUL bytes)', 'give text'


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head, final=len(head) < _HEAD)
    except UnicodeDecodeError:
        return False
    return True


def key(path: pathlib.Path) -> str:
    """Returns a name for the contents of a file, which changes with its size or date."""
    status = path.stat()
    identity = f'{path.resolve()}|{status.st_size}|{status.st_mtime_ns}'
    return hashlib.sha256(identity.encode()).hexdigest()[:20]


def write_atomically(path: pathlib.Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes beside `path` and renames: a file with the final name is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix='.part-', delete=False)  # noqa: SIM115
    except OSError as error:
        raise UserError(f'data.cache_dir: cannot write to {path.parent}: {error.strerror}') from error
    try:
        with file:
            write(file)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f'data.cache_dir: cannot write to {path.parent}: {error.strerror}') from error
    finally:
        pathlib.Path(file.name).unlink(missing_ok=True)
