"""What chunks that end where a paragraph does would cost where shapes are static: places that hold no token."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gau.data import sources
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

# What ends a paragraph, by name: a new line; a blank line, where lines of a paragraph are broken; or, which is shorter
# than a paragraph, a sentence.
ENDS = {'line': r'\n+', 'blank_line': r'\n[ \t\r]*\n\s*', 'sentence': r'[.!?]["\')\]\u201d\u2019]*\s+|\n{2,}'}


class Chunks(NamedTuple):
    """How a text falls into chunks of at most `size` tokens.

    Attributes:
      size: tokens of the largest chunk.
      tokens: of a chunk, mean.
      filled: share of the places that hold a token, where every chunk takes `size` places.
      filled_by_sizes: the same, where a chunk takes the fewest of size, size / 2, size / 4 and size / 8 that hold it.
      seen: tokens of its own chunk that a token reads, itself included, mean.
    """

    size: int
    tokens: float
    filled: float
    filled_by_sizes: float
    seen: float


def survey(config: ConfigDict, split: str, tokenizer: Tokenizer, *, ends: str, at_most: int) -> list[np.ndarray]:
    """Returns the tokens of every paragraph, in order, for at most `at_most` documents, spread evenly over a source.

    Args:
      config: `config.data`.
      split: of it.
      tokenizer: which counts.
      ends: a name of `ENDS`.
      at_most: documents.

    Raises:
      UserError: as `sources.open_split`; or tokens without their text.
    """
    opened, found = sources.open_split(config, split), []
    for documents in opened:
        count = len(documents)
        chosen = np.unique(np.linspace(0, max(count - 1, 0), min(count, at_most // len(opened))).astype(int))
        for document in (documents[index] for index in chosen.tolist()):
            if document is None:
                continue
            if document.text is None:
                raise UserError(f'{config.source} holds tokens, whose paragraphs nobody knows: give the text')
            found.append(np.array([len(tokenizer.encode(text)) for text in _paragraphs(document.text, ends)], np.int64))
    return found


def _paragraphs(text: str, ends: str) -> Iterator[str]:
    """Yields the paragraphs, each with what ends it."""
    begin = 0
    for match in re.finditer(ENDS[ends], text):
        yield text[begin : match.end()]
        begin = match.end()
    if begin < len(text):
        yield text[begin:]


def chunks(documents: Sequence[np.ndarray], size: int) -> Chunks:
    """Cuts documents into chunks of at most `size` tokens that end with a paragraph wherever one ends in them.

    A chunk takes whole paragraphs as long as they fit; one that is longer than a chunk is cut, and its rest begins the
    next chunk. Where none is that long, no choice among the paragraphs' ends gives fewer chunks. Some document has a
    token.
    """
    lengths = np.array([length for document in documents for length in _cut(document, size)], np.float64)
    total, sizes = lengths.sum(), np.array([size / 8, size / 4, size / 2, size])
    places = sizes[np.searchsorted(sizes, lengths)]
    return Chunks(
        size=size,
        tokens=lengths.mean(),
        filled=total / (size * lengths.size),
        filled_by_sizes=total / places.sum(),
        seen=(lengths * (lengths + 1) / 2).sum() / total,
    )


def _cut(paragraphs: np.ndarray, size: int) -> Iterator[int]:
    used = 0
    for tokens in paragraphs.tolist():
        if used and used + tokens > size:
            yield used
            used = 0
        used += tokens
        while used > size:
            yield size
            used -= size
    if used:
        yield used


def table(documents: Sequence[np.ndarray], sizes: Sequence[int]) -> str:
    """Returns the lines of a table, a chunk size each, beside fixed chunks and windows of two of half the size.

    Raises:
      UserError: the documents have no tokens.
    """
    lengths = np.concatenate([np.array([], np.int64), *documents])
    if not lengths.size:
        raise UserError('the texts have no tokens')
    quartiles = ', '.join(f'{x:,.0f}' for x in np.quantile(lengths, (0.25, 0.5, 0.75, 0.95)))
    lines = [
        f'{lengths.size:,} paragraphs of {lengths.mean():,.0f} tokens (quartiles and 95 %: {quartiles})',
        '  C  tokens a chunk   filled   cost  by sizes   cost   reads   fixed   window of 2 x C/2',
    ]
    for size in sizes:
        found = chunks(documents, size)
        lines.append(
            f'{size:>4}  {found.tokens:>14.1f}  {found.filled:>7.1%}  {1 / found.filled:>5.2f}'
            f'  {found.filled_by_sizes:>8.1%}  {1 / found.filled_by_sizes:>5.2f}'
            f'  {found.seen:>6.1f}  {(size + 1) / 2:>6.1f}  {(3 * size / 2 + 1) / 2:>18.1f}'
        )
    return '\n'.join(lines)
