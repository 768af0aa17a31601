"""What chunks that end where a paragraph does would cost where shapes are static: places that hold no token."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from gau import plots
from gau.data import sources
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

# What ends a paragraph, by name: a new line; a blank line, where lines of a paragraph are broken; or, which is shorter
# than a paragraph, a sentence.
ENDS = {'line': r'\n+', 'blank_line': r'\n[ \t\r]*\n\s*', 'sentence': r'[.!?]["\')\]\u201d\u2019]*\s+|\n{2,}'}

NAMES = {'line': 'paragraph', 'blank_line': 'paragraph', 'sentence': 'sentence'}


class Chunks(NamedTuple):
    """How a text falls into chunks of at most `size` tokens.

    Attributes:
      size: tokens of the largest chunk.
      tokens: of a chunk, mean.
      filled: share of the places that hold a token, where every chunk takes `size` places.
      filled_by_sizes: the same, where a chunk takes the fewest of size, size / 2, size / 4 and size / 8 that hold it.
      seen: tokens of its own chunk that a token reads, itself included, mean.
      half, half_by_sizes: half of the 95 % intervals of the two shares, over documents; None of a single one.
    """

    size: int
    tokens: float
    filled: float
    filled_by_sizes: float
    seen: float
    half: float | None = None
    half_by_sizes: float | None = None


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
    cut = [np.fromiter(_cut(document, size), np.float64) for document in documents]
    lengths, sizes = np.concatenate(cut), np.array([size / 8, size / 4, size / 2, size])
    # Tokens, and places of either kind, of each document.
    tokens = np.array([own.sum() for own in cut])
    places = np.array([size * own.size for own in cut])
    by_sizes = np.array([sizes[np.searchsorted(sizes, own)].sum() for own in cut])
    total = tokens.sum()
    return Chunks(
        size=size,
        tokens=lengths.mean(),
        filled=total / places.sum(),
        filled_by_sizes=total / by_sizes.sum(),
        seen=(lengths * (lengths + 1) / 2).sum() / total,
        half=_half(tokens, places),
        half_by_sizes=_half(tokens, by_sizes),
    )


def _half(tokens: np.ndarray, places: np.ndarray) -> float | None:
    """Returns half of the 95 % interval of a ratio of sums, by its linear part and Student's t over documents."""
    n = len(tokens)
    if n < 2:
        return None
    rest = tokens - places * (tokens.sum() / places.sum())
    error = np.sqrt(n / (n - 1) * (rest**2).sum()) / places.sum()
    return float(stats.t.ppf(0.975, n - 1) * error)


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
    lengths = _lengths(documents)
    quartiles = ', '.join(f'{x:,.0f}' for x in np.quantile(lengths, (0.25, 0.5, 0.75, 0.95)))
    lines = [
        f'{lengths.size:,} paragraphs of {lengths.mean():,.0f} tokens (quartiles and 95 %: {quartiles})',
        '  C  tokens a chunk   filled         cost  by sizes       cost   reads   fixed   window of 2 x C/2',
    ]
    for size in sizes:
        found = chunks(documents, size)
        lines.append(
            f'{size:>4}  {found.tokens:>14.1f}  {found.filled:>7.1%}{_shown(found.half)}  {1 / found.filled:>5.2f}'
            f'  {found.filled_by_sizes:>8.1%}{_shown(found.half_by_sizes)}  {1 / found.filled_by_sizes:>5.2f}'
            f'  {found.seen:>6.1f}  {(size + 1) / 2:>6.1f}  {(3 * size / 2 + 1) / 2:>18.1f}'
        )
    return '\n'.join(lines)


def plot(surveys: Mapping[str, Sequence[np.ndarray]], sizes: Sequence[int], path: Path, *, title: str) -> None:
    """Draws the share of empty places over the size of a chunk, with 95 % intervals over documents.

    Args:
      surveys: documents as `survey` returns them, by what ends a paragraph.
      sizes: of chunks.
      path: the PNG.
      title: of the picture.

    Raises:
      UserError: the documents have no tokens.
    """
    canvas, axes = plots.figure('C, tokens of the largest chunk', 'empty places (%)', title)
    for color, (ends, documents) in zip(('tab:blue', 'tab:orange', 'tab:green'), surveys.items(), strict=False):
        _lengths(documents)
        found = [chunks(documents, size) for size in sizes]
        for name, style, filled, half in (
            ('every chunk C places', '-', [c.filled for c in found], [c.half for c in found]),
            ('C, C/2, C/4 or C/8', '--', [c.filled_by_sizes for c in found], [c.half_by_sizes for c in found]),
        ):
            empty, bars = ([100 * x for x in numbers] for numbers in ([1 - x for x in filled], [x or 0 for x in half]))
            label = f'ends with a {NAMES[ends]}, {name}'
            axes.errorbar(sizes, empty, yerr=bars, color=color, linestyle=style, marker='o', capsize=3, label=label)
    axes.set_xscale('log', base=2)
    axes.set_xticks(sizes, [f'{size:,}' for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    plots.save(canvas, path)


def _lengths(documents: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.concatenate([np.array([], np.int64), *documents])
    if not lengths.size:
        raise UserError('the texts have no tokens')
    return lengths


def _shown(half: float | None) -> str:
    return f' ± {half:4.1%}' if half is not None else ' ' * 7
