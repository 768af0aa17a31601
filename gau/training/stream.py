"""Evaluation that reads whole texts with the state carried along: unlimited context at constant memory.

`bits per byte` of a book then counts every token with all of the book before it. To see what the carried state is
worth, the same reader can forget every `context` tokens: the same targets, each with at most so much to look back on.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gau.data import examples, sources
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError
from gau.models import decoding
from gau.models.language_model import LanguageModel
from gau.training.evaluation import Result

# Texts that are read side by side, and tokens of each that are read at once.
ROWS = 8
BLOCK = 2048


class StreamEvaluator:
    """Evaluates parameters on a split, text by text; `Evaluator`'s sibling with the same results.

    Raises:
      UserError: the model keeps every token, so that no memory would be constant, or cannot be decoded at all.
    """

    def __init__(self, config: ConfigDict, model: LanguageModel, tokenizer: Tokenizer, *, block: int = BLOCK):
        """Takes the resolved config of the run, its model and tokenizer; `block`: tokens of a text read at once."""
        decoding.check(model)
        if decoding.keeps_all_tokens(model):
            raise UserError(
                f'{config.model.name} keeps the keys and values of all tokens: it has no state of constant size to '
                'stream with; use --contexts without --stream'
            )
        self._config, self._model, self._tokenizer, self._block = config, model, tokenizer, block
        self._read = jax.jit(functools.partial(_read, model), donate_argnums=1)

    def __call__(self, params: Any, *, split: str, context: int | None = None) -> Result:
        """Reads the split once and returns its sums.

        Args:
          params: the model's parameters, unboxed.
          split: a split of the config's data.
          context: tokens after which the state is forgotten; None carries it to the end of each text.

        Raises:
          UserError: unknown split.
        """
        texts = self._texts(split)
        state = decoding.init_state(self._model, batch_size=ROWS)
        rows = [_Row() for _ in range(ROWS)]
        sums, by_position, in_flight = np.zeros(4), np.zeros((2, 0)), None
        while True:
            for row in rows:
                if row.left == 0:
                    row.begin(next(texts, None))
            pieces = [row.take(self._block, context) for row in rows]
            if not any(len(piece.table) for piece in pieces):
                break
            tokens_BT = np.zeros((ROWS, self._block), np.int32)
            targets_BT = np.zeros((ROWS, self._block), np.int32)
            for b, piece in enumerate(pieces):
                tokens_BT[b, : len(piece.table)] = piece.table[:, examples.INPUTS]
                targets_BT[b, : len(piece.table)] = piece.table[:, examples.TARGETS]
            length_B = np.array([len(piece.table) for piece in pieces], np.int32)
            fresh_B = np.array([piece.position == 0 for piece in pieces])
            nll_BT, state = self._read(params, state, tokens_BT, targets_BT, length_B, fresh_B)
            # One block is summed up on the host while the device reads the next.
            if in_flight is not None:
                by_position = _add(sums, by_position, *in_flight)
            in_flight = pieces, nll_BT
        if in_flight is not None:
            by_position = _add(sums, by_position, *in_flight)
        return Result(split, context or by_position.shape[1], *sums.tolist(), *by_position)

    def _texts(self, split: str) -> Iterator[np.ndarray]:
        """Yields the columns of `gau.data.examples` of one document after another, up to eval.max_tokens in all."""
        columns = examples.lm_columns(self._tokenizer, sizes=True)
        left = self._config.eval.max_tokens or np.inf
        for documents in sources.open_split(self._config.data, split):
            for i in range(len(documents)):
                document = documents[i]
                if document is None:
                    continue
                table = columns([document])['tokens']
                yield table[: int(min(left, len(table)))]
                left -= len(table)
                if left <= 0:
                    return


class _Piece:
    """Tokens of one text, and how many of it the state already holds."""

    def __init__(self, table: np.ndarray, position: int):
        self.table, self.position = table, position


class _Row:
    """A place in the batch, where one text is read after the other."""

    def __init__(self):
        self.begin(None)

    def begin(self, table: np.ndarray | None) -> None:
        self._table, self._done = np.zeros((0, 4), np.int32) if table is None else table, 0

    @property
    def left(self) -> int:
        return len(self._table) - self._done

    def take(self, most: int, context: int | None) -> _Piece:
        """Returns the next tokens, at most so many and not past the place where the state is forgotten."""
        position = self._done % context if context else self._done
        if context:
            most = min(most, context - position)
        piece = _Piece(self._table[self._done : self._done + most], position)
        self._done += len(piece.table)
        return piece


def _read(model, params, state, tokens_BT, targets_BT, length_B, fresh_B):
    """Returns the losses [B, T] of a block, with rows that begin anew, and the new state."""

    def forgotten(x):
        return jnp.where(fresh_B.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)

    state = decoding.map_rows(forgotten, state, stacked=model.config.layer_stack == 'scan')
    h_BTD, state = decoding.extend(model, params, state, tokens_BT, length_B)
    return model.apply({'params': params}, h_BTD, targets_BT, method='losses'), state


def _add(sums: np.ndarray, by_position: np.ndarray, pieces: list[_Piece], nll_BT: jax.Array) -> np.ndarray:
    """Adds a block to the sums, in place, and to the sums by position, which are returned and may have grown."""
    longest = max(piece.position + len(piece.table) for piece in pieces)
    by_position = np.pad(by_position, ((0, 0), (0, max(0, longest - by_position.shape[1]))))
    for piece, nll_T in zip(pieces, np.asarray(nll_BT, np.float64), strict=True):
        n = len(piece.table)
        sums += (nll_T[:n].sum(), n, *piece.table[:, [examples.BYTES, examples.WORDS]].sum(axis=0))
        by_position[0, piece.position : piece.position + n] += nll_T[:n]
        by_position[1, piece.position : piece.position + n] += 1
    return by_position
