"""Documents by index: what every source of text offers, and which splits it has.

A source is a sequence: `len(source)` and `source[i]`, which is a `Document`, or None for one that is skipped (blank, or
bad under `bad_lines="skip"`). Random access is what makes the global shuffle and the exact resume cheap.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import embedded
from gau.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Document:
    """A document as text, or as tokens with the size of the text they came from."""

    text: str | None = None
    tokens: np.ndarray | None = None
    n_bytes: int = 0
    n_words: int = 0


class Documents(Protocol):
    """A split of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document | None: ...


class Texts:
    """Documents held in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.text_bytes = sum(len(text.encode('utf-8', errors='replace')) for text in texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Document:
        return Document(text=self._texts[index])


def splits(config: ConfigDict) -> list[str]:
    """Returns the splits of the (resolved) data config that every one of its sources has, `train` first."""
    common: list[str] | None = None
    for source in data_config.sources(config):
        own = _splits_of(config, source)
        common = own if common is None else [split for split in common if split in own]
    return common or []


def open_split(config: ConfigDict, split: str) -> list[Documents]:
    """Returns the documents of `split`, one sequence for each source of the (resolved) data config.

    Raises:
      UserError: no such split; missing, empty or broken files.
    """
    if split not in splits(config):
        raise UserError(f'data.source="{config.source}" has no split "{split}"{did_you_mean(split, splits(config))}')
    return [_open(config, source, split) for source in data_config.sources(config)]


def _splits_of(config: ConfigDict, source: str) -> list[str]:
    if data_config.source_kind(source) == 'embedded':
        return list(embedded.SPLITS)
    raise UserError(f'data.source="{source}" is not there yet')


def _open(config: ConfigDict, source: str, split: str) -> Documents:
    return Texts([text for _, text in embedded.split_text(split)])
