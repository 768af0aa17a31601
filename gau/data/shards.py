"""Prepared tokens: ArrayRecord files with one document a record, written by scripts/prepare_data.py.

A record is the document's size in bytes and in words (two little-endian uint64) and its tokens without specials, uint16
where the vocabulary fits and int32 where not. One document a record keeps the shuffle global and by document, and the
sizes keep bits per byte exact without the text.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gau.data import manifest
from gau.data.documents import Document
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

_HEADER = np.dtype('<u8')
# Grain reads records one by one, which a larger group makes slower.
_WRITER_OPTIONS = 'group_size:1'


def token_dtype(vocab_size: int) -> str:
    """Returns the dtype that holds every id of a vocabulary: `uint16` or `int32`."""
    return 'uint16' if vocab_size <= 2**16 else 'int32'


def write(path: pathlib.Path, documents: Iterable[tuple[np.ndarray, int, int]], dtype: str) -> dict[str, int]:
    """Writes (tokens, bytes, words) of each document to `path`; returns their number and sums.

    The file's contents depend on the documents only.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    totals = {'documents': 0, 'tokens': 0, 'bytes': 0, 'words': 0}
    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    for tokens, n_bytes, n_words in documents:
        stored = np.asarray(tokens).astype(np.dtype(dtype).newbyteorder('<'))
        writer.write(np.array([n_bytes, n_words], _HEADER).tobytes() + stored.tobytes())
        for key, value in zip(totals, (1, len(tokens), n_bytes, n_words), strict=True):
            totals[key] += value
    writer.close()
    return totals


class Shards:
    """The documents of one split of a directory of prepared tokens.

    Raises:
      UserError: the manifest is missing, its tokenizer is another one, a shard is missing or not whole.
    """

    def __init__(self, directory: str, split: str, tokenizer: Tokenizer) -> None:
        contents = manifest.read(directory)
        made_with = contents['tokenizer']
        if made_with['fingerprint'] != tokenizer.fingerprint:
            raise UserError(
                f'tokens:{directory} was prepared with the tokenizer {made_with["spec"]} ({made_with["fingerprint"]}), '
                f'the one in use is another ({tokenizer.fingerprint}): prepare the text again with that one, or leave '
                'data.tokenizer out if it is set'
            )
        # Earlier versions let text give special ids, where the tokenizer's model does so.
        safe = 'special_in_text' in contents.get('plan', {}).get('options', {})
        self._suspected = () if safe else sorted(tokenizer.spelt_by_text)
        self._where = f'tokens:{directory}: a document of the split "{split}"'
        self._dtype = np.dtype(contents['dtype']).newbyteorder('<')
        self.totals: dict[str, Any] = contents['splits'][split]
        paths = []
        for shard in self.totals['shards']:
            path = os.path.join(directory, shard['file'])
            size = os.path.getsize(path) if os.path.exists(path) else None
            if size != shard['size']:
                found = 'missing' if size is None else f'{size} bytes'
                raise UserError(f'{path}: {found}, where the manifest says {shard["size"]} bytes: prepare it again')
            if shard['documents']:
                paths.append(path)
        self._records = _open(paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        return self._document(self._records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Document]:
        """Reads several documents at once, which is faster than one by one."""
        return [self._document(record) for record in self._records.__getitems__(indices)]

    def _document(self, record: bytes) -> Document:
        n_bytes, n_words = np.frombuffer(record, _HEADER, count=2).tolist()
        tokens = np.frombuffer(record, self._dtype, offset=2 * _HEADER.itemsize)
        for special in self._suspected:
            if (tokens == special).any():
                raise UserError(
                    f'{self._where} holds the special id {special}, which an earlier version made of its text: '
                    'prepare it again, into another directory'
                )
        return Document(tokens=tokens, n_bytes=n_bytes, n_words=n_words)


def _open(paths: list[str]) -> Any:
    if not paths:
        return ()
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(paths)
