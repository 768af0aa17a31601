"""From a document to the columns the model is fed, and from packed rows to a batch.

A document becomes one int32 array [tokens, columns] whose columns stay side by side through packing, so that a row is
cut from all of them at the same place:
  INPUTS, TARGETS        always;
  WEIGHTS                MLM: 1 where the token is to be predicted;
  BYTES, WORDS           LM evaluation: the document's size, spread evenly over its targets.
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from gau.data.documents import Document
from gau.data.tokenizers import Tokenizer

Columns = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

INPUTS, TARGETS = 0, 1
WEIGHTS = 2
BYTES, WORDS = 2, 3


def encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens of `document`, int32 [tokens], without specials."""
    if document.tokens is not None:
        return document.tokens
    return tokenizer.encode(document.text)


def size(document: Document) -> tuple[int, int]:
    """Returns the number of UTF-8 bytes and of whitespace-separated words of the document's text."""
    if document.tokens is not None:
        return document.n_bytes, document.n_words
    return len(document.text.encode('utf-8', errors='replace')), len(document.text.split())


def framed(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """Returns BOS + tokens + EOS, int32 [tokens + 2]."""
    tokens = encode(document, tokenizer)
    frame = np.empty(len(tokens) + 2, np.int32)
    frame[0], frame[1:-1], frame[-1] = tokenizer.bos_id, tokens, tokenizer.eos_id
    return frame


def lm_columns(tokenizer: Tokenizer, *, sizes: bool = False) -> Callable[[Document], Columns]:
    """Returns the map for next-token prediction: inputs BOS + tokens, targets tokens + EOS, thus equally long.

    Shifting within the document, before packing, means that a document continued in the next row is fed its true
    previous token there, and that no token is lost or predicted twice.
    """

    def columns(document: Document) -> Columns:
        frame = framed(document, tokenizer)
        table = np.empty((len(frame) - 1, 4 if sizes else 2), np.int32)
        table[:, INPUTS], table[:, TARGETS] = frame[:-1], frame[1:]
        if sizes:
            table[:, BYTES], table[:, WORDS] = (_spread(total, len(table)) for total in size(document))
        return {'tokens': table}

    return columns


def _spread(total: int, n: int) -> np.ndarray:
    """Returns n integers as even as can be whose sum is exactly `total`, int64 [n]."""
    return np.diff(np.arange(n + 1, dtype=np.int64) * total // n)


def pieces(context: int) -> Callable[[Columns], list[Columns]]:
    """Returns the map that cuts a document into pieces of at most `context` tokens, none lost."""

    def cut(columns: Columns) -> list[Columns]:
        table = columns['tokens']
        return [{'tokens': table[start : start + context]} for start in range(0, len(table), context)]

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


def finish(config: ConfigDict, *, objective: str, pad_id: int, padded: bool, sizes: bool) -> Callable[[Columns], Batch]:
    """Returns the map from packed rows, stacked, to the batch that the model and the loss get.

    Args:
      config: the resolved data config.
      objective: `lm` or `mlm`.
      pad_id: token at padding.
      padded: whether rows may hold padding that a model could see.
      sizes: whether `target_bytes` and `target_words` are asked for.
    """
    marked = padded or not config.attend_across_documents

    def batch(columns: Columns) -> Batch:
        table, segment_ids = columns['tokens'], columns['tokens_segment_ids']
        real = segment_ids > 0
        inputs, targets = table[..., INPUTS], table[..., TARGETS]
        if padded or not real.all():
            inputs, targets = np.where(real, inputs, pad_id), np.where(real, targets, pad_id)
        weights = table[..., WEIGHTS] if objective == 'mlm' else real
        out = {
            'inputs': np.ascontiguousarray(inputs, np.int32),
            'targets': np.ascontiguousarray(targets, np.int32),
            'weights': np.ascontiguousarray(weights, np.float32),
        }
        if marked:
            positions = columns['tokens_positions']
            if config.attend_across_documents:
                segment_ids = real.astype(np.int32)
                positions = np.where(real, np.arange(real.shape[1], dtype=np.int32), 0)
            out['segment_ids'], out['positions'] = segment_ids, positions
        if sizes:
            out['target_bytes'] = np.ascontiguousarray(table[..., BYTES], np.float32)
            out['target_words'] = np.ascontiguousarray(table[..., WORDS], np.float32)
        return out

    return batch
