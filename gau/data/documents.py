"""A document, and sequences of documents.

A source's split is a sequence: `len(documents)` and `documents[i]`, which is a `Document`, or None for one that is left
out (blank, or bad under `bad_lines="skip"`). Random access is what makes the global shuffle and the exact resume cheap.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """A document as text, or as tokens with the size of the text they came from.

    Attributes:
      text, tokens: one of them, tokens int32 or uint16 [tokens].
      n_bytes, n_words: for tokens, of their text.
      record: the JSON object that the text is a field of, or what else is known of the text.
      place: says where the document stands, for error messages.
      escape: for text, whether what spells a special token of the tokenizer is encoded otherwise (else an error).
    """

    text: str | None = None
    tokens: np.ndarray | None = None
    n_bytes: int = 0
    n_words: int = 0
    record: Mapping[str, Any] | None = None
    place: Callable[[], str] | None = None
    escape: bool = True


class Documents(Protocol):
    """A split of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document | None: ...


class Texts:
    """Documents held in memory, with their names and records if they have any."""

    def __init__(
        self, texts: Sequence[str], names: Sequence[str] = (), records: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._texts, self._names, self._records = texts, names, records

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Document:
        name = self._names[index] if self._names else f'document {index + 1}'
        record = self._records[index] if self._records else None
        return Document(text=self._texts[index], record=record, place=lambda: name)


class Joined:
    """Several sequences of documents end to end."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document | None:
        number = int(np.searchsorted(self._ends, index, side='right'))
        return self._parts[number][index - (int(self._ends[number - 1]) if number else 0)]


class Unescaped:
    """The same documents, in which text that spells a special token is an error when it is encoded."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document | None:
        document = self._documents[index]
        return document and dataclasses.replace(document, escape=False)


class Held:
    """One side of a hold-out: every k-th document is `valid`, the others `train`; see `hold_out`."""

    def __init__(self, documents: Documents, every: int, split: str) -> None:
        self._documents, self._every, self._split = documents, every, split
        held = len(documents) // every
        self._length = held if split == 'valid' else len(documents) - held

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document | None:
        if self._split == 'valid':
            return self._documents[index * self._every + self._every - 1]
        return self._documents[index + index // (self._every - 1)]


def nested(record: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a field, or of one below it: `meta.text` is `text` in `meta`, unless a field is called so.

    Raises:
      KeyError: there is none.
    """
    if field in record:
        return record[field]
    first, _, rest = field.partition('.')
    if not rest or first not in record or not hasattr(record[first], 'keys'):
        raise KeyError(field)
    return nested(record[first], rest)


def hold_out(documents: Documents, *, every: int, split: str) -> Documents:
    """Returns the `train` or `valid` part of documents that have no split of their own.

    Every `every`-th document is held out; the last one if there are fewer; of a lone one the tail, from a line's
    beginning if it has lines.
    """
    if len(documents) > 1:
        return Held(documents, min(every, len(documents)), split)
    document = documents[0]
    if document is None:
        return Texts([])
    text = document.text
    cut = len(text) - len(text) // every
    line = text.find('\n', cut)
    cut = line + 1 if 0 <= line < len(text) - 1 else cut
    return Texts([text[:cut] if split == 'train' else text[cut:]], [document.place()] if document.place else [])
