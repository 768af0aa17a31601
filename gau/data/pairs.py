"""Pairs: a source and a target of every document, in the two halves of a row.

A row of N places has the source in its first N / 2 and BOS target in the others, whose targets are the target itself;
what is left in either half is padding.
"""

from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from gau.data import examples
from gau.data.documents import Document, nested
from gau.data.examples import BEGIN, INPUTS, NOTHING, TARGETS, WEIGHTS, Columns
from gau.data.formats import RowFormat
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

Pair = tuple[np.ndarray, np.ndarray]

# The field of a document that has its title.
TITLE = 'title'


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the section `data`, resolved before, if its rows can hold pairs. Raises UserError."""
    if config.packing != 'concat':
        raise UserError(f'data.packing={config.packing}: pairs fill whole rows, which stand end to end (concat)')
    if config.attend_across_documents:
        raise UserError('data.attend_across_documents=True would let a source see the target it is to predict')
    if config.context % 2 or config.context < 4:
        raise UserError(f'data.context={config.context} must be an even number from 4 on: a row is two halves')
    return config


def halves(document: Document, tokenizer: Tokenizer, context: int) -> Iterator[Pair]:
    """Yields first and second half of every passage of a document; nothing of it is left out.

    The document, with EOS at its end, is cut into as few passages of at most `context` tokens as can be, all equally
    long to a token. Of an empty document there is none.
    """
    tokens = np.append(examples.encode(document, tokenizer), tokenizer.eos_id).astype(np.int32)
    if len(tokens) > 1:
        for passage in np.array_split(tokens, -(-len(tokens) // context)):
            middle = len(passage) // 2
            yield passage[:middle], passage[middle:]


def titles(document: Document, tokenizer: Tokenizer, context: int) -> Iterator[Pair]:
    """Yields the beginning of a document's text, without the title that it may begin with, and its title with EOS.

    Raises:
      UserError: the document has no title.
    """
    try:
        title = nested(document.record or {}, TITLE)
    except KeyError:
        title = None
    if not isinstance(title, str) or not title.strip():
        place = document.place() if document.place else 'a document'
        raise UserError(f'{place}: no text in the field "{TITLE}"')
    text, title = document.text.removeprefix(title).lstrip(), title.strip()
    source, target = (
        examples.encode(Document(text=part, place=document.place, escape=document.escape), tokenizer)
        for part in (text, title)
    )
    half = context // 2
    if len(source):
        yield source[:half].astype(np.int32), np.append(target[: half - 1], tokenizer.eos_id).astype(np.int32)


def columns(
    pairs: Callable[[Document, Tokenizer, int], Iterator[Pair]], config: ConfigDict, tokenizer: Tokenizer
) -> Callable[[list[Document]], Columns | None]:
    """Returns the map from documents to columns of whole rows, one for each of the `pairs` of a document."""
    context, half = config.context, config.context // 2

    def row(source: np.ndarray, target: np.ndarray) -> np.ndarray:
        table = np.zeros((context, 3), np.int32)
        end = half + len(target)
        table[:, INPUTS] = NOTHING
        table[: len(source), INPUTS] = source
        table[half, INPUTS], table[half + 1 : end, INPUTS] = BEGIN, target[:-1]
        table[half:end, TARGETS], table[half:end, WEIGHTS] = target, 1
        return table

    def of_group(documents: list[Document]) -> Columns | None:
        rows = [row(*pair) for document in documents for pair in pairs(document, tokenizer, context)]
        return {'tokens': np.concatenate(rows)} if rows else None

    return of_group


def _format(name: str, pairs: Callable[[Document, Tokenizer, int], Iterator[Pair]]) -> RowFormat:
    return RowFormat(
        name,
        packing='concat',
        frame=1,
        columns=lambda config, tokenizer, sizes: columns(pairs, config, tokenizer),
        draws=False,
        weights=lambda table, real: table[..., WEIGHTS] * real,
        spells=False,
        causal=True,
    )


HALVES, TITLES = _format('halves', halves), _format('titles', titles)
