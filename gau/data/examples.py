"""From documents to the columns the model is fed, and from packed rows to a batch.

Documents go through the pipeline in small groups, so that what costs time per element is shared by short ones. A group
becomes one int32 array [tokens, columns] whose columns stay side by side through packing, so that a row is cut from all
of them at the same place:
  INPUTS, TARGETS        always;
  WEIGHTS                MLM: 1 where the token is to be predicted; classification: 1 at the end of the text;
  BYTES, WORDS           LM evaluation: the document's size, spread evenly over its targets.
A document begins where the inputs are BEGIN, which is no id and becomes BOS in the batch: borders need no column of
their own, and no token can be taken for one. NOTHING, no id either, is padding that a document brings along.
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from gau.data.documents import Document
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

Columns = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

INPUTS, TARGETS = 0, 1
WEIGHTS = 2
BYTES, WORDS = 2, 3
BEGIN, NOTHING = -1, -2


def encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens of `document`, int32 [tokens], without specials.

    Raises:
      UserError: as `Tokenizer.encode`, with the document's place.
    """
    if document.tokens is not None:
        return document.tokens
    try:
        return tokenizer.encode(document.text, escape=document.escape)
    except UserError as error:
        raise UserError(f'{document.place()}: {error}' if document.place else str(error)) from error


def size(document: Document) -> tuple[int, int]:
    """Returns the number of UTF-8 bytes and of whitespace-separated words of the document's text."""
    if document.tokens is not None:
        return document.n_bytes, document.n_words
    return len(document.text.encode('utf-8', errors='replace')), len(document.text.split())


def framed(documents: list[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns BEGIN + tokens + EOS of all documents end to end, int32 [n], and where these stand, int64 [documents]."""
    tokens = [encode(document, tokenizer) for document in documents]
    lengths = np.fromiter((len(part) + 2 for part in tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    frame = np.empty(int(ends[-1]), np.int32)
    frame[starts], frame[ends - 1] = BEGIN, tokenizer.eos_id
    for part, start in zip(tokens, starts.tolist(), strict=True):
        frame[start + 1 : start + 1 + len(part)] = part
    return frame, starts, ends - 1


def lm_columns(tokenizer: Tokenizer, *, sizes: bool = False) -> Callable[[list[Document]], Columns]:
    """Returns the map for next-token prediction: inputs BEGIN + tokens, targets tokens + EOS, thus equally long.

    Shifting within the document, before packing, means that a document continued in the next row is fed its true
    previous token there, and that no token is lost or predicted twice.
    """

    def columns(documents: list[Document]) -> Columns | None:
        if not documents:
            return None
        frame, starts, ends = framed(documents, tokenizer)
        table = np.empty((len(frame) - len(documents), 4 if sizes else 2), np.int32)
        table[:, INPUTS], table[:, TARGETS] = np.delete(frame, ends), np.delete(frame, starts)
        if sizes:
            targets = ends - starts
            totals = [size(document) for document in documents]
            for column, of_each in zip((BYTES, WORDS), zip(*totals, strict=True), strict=True):
                table[:, column] = np.concatenate([_spread(*pair) for pair in zip(of_each, targets, strict=True)])
        return {'tokens': table}

    return columns


def _spread(total: int, n: int) -> np.ndarray:
    """Returns n integers as even as can be whose sum is exactly `total`, int64 [n]."""
    return np.diff(np.arange(n + 1, dtype=np.int64) * total // n)


def pieces(context: int) -> Callable[[Columns], list[Columns]]:
    """Returns the map that cuts a group into documents, and these into pieces of at most `context`, none lost."""

    def cut(columns: Columns) -> list[Columns]:
        table = columns['tokens']
        borders = np.flatnonzero(table[:, INPUTS] == BEGIN).tolist()
        return [
            {'tokens': table[first : min(first + context, end)]}
            for start, end in zip(borders, [*borders[1:], len(table)], strict=True)
            for first in range(start, end, context)
        ]

    return cut


def padded_row(context: int) -> Callable[[Columns], Columns]:
    """Returns the map from a piece of at most `context` tokens to a row of its own, in the packers' format."""

    def pad(columns: Columns) -> Columns:
        table = columns['tokens']
        row = np.zeros((context, table.shape[1]), np.int32)
        segment_ids, positions = np.zeros(context, np.int32), np.zeros(context, np.int32)
        row[: len(table)], segment_ids[: len(table)], positions[: len(table)] = table, 1, np.arange(len(table))
        return {'tokens': row, 'tokens_segment_ids': segment_ids, 'tokens_positions': positions}

    return pad


def finish(
    config: ConfigDict,
    *,
    weights: Callable[[np.ndarray, np.ndarray], np.ndarray],
    tokenizer: Tokenizer,
    padded: bool,
    sizes: bool,
) -> Callable[[Columns], Batch]:
    """Returns the map from packed rows, stacked, to the batch that the model and the loss get.

    Args:
      config: the resolved data config.
      weights: (columns, whether a place is no padding) -> the weights of the targets.
      tokenizer: gives BOS and PAD.
      padded: whether rows may hold padding that a model could see.
      sizes: whether `target_bytes` and `target_words` are asked for.
    """
    marked = padded or not config.attend_across_documents

    def batch(columns: Columns) -> Batch:
        table, segment_ids = columns['tokens'], columns['tokens_segment_ids']
        real = (segment_ids > 0) & (table[..., INPUTS] != NOTHING)
        inputs, targets = table[..., INPUTS], table[..., TARGETS]
        if padded or not real.all():
            inputs, targets = (np.where(real, ids, tokenizer.pad_id) for ids in (inputs, targets))
        inputs = np.array(inputs, np.int32)
        begins = inputs == BEGIN
        np.copyto(inputs, tokenizer.bos_id, where=begins)
        out = {
            'inputs': inputs,
            'targets': np.ascontiguousarray(targets, np.int32),
            'weights': np.ascontiguousarray(weights(table, real), np.float32),
        }
        if marked:
            if config.attend_across_documents:
                begins[:] = False
            else:
                # What packing calls an element is a group (concat) or a piece.
                begins[:, 1:] |= np.diff(segment_ids, axis=1) != 0
            out['segment_ids'], out['positions'] = _segments(begins, real)
        if sizes:
            out['target_bytes'] = np.ascontiguousarray(table[..., BYTES], np.float32)
            out['target_words'] = np.ascontiguousarray(table[..., WORDS], np.float32)
        return out

    return batch


def _segments(begins: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment ids from 1 and positions from 0, int32 [b, N]; a row begins a segment anyhow, padding is 0."""
    begins[:, 0] = True
    places = np.arange(real.shape[1], dtype=np.int32)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return np.where(real, np.cumsum(begins, axis=1, dtype=np.int32), 0), np.where(real, positions, 0)
