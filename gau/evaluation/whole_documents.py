"""Perplexity of whole documents, read with the decoding state carried along: unlimited context at constant memory.

Bits per byte of a book then count every token with all of the book before it. To see what the carried state is worth,
the same reader forgets it every `context` tokens: the same targets, each with at most so much to look back on.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gau.data import examples, sources
from gau.errors import UserError
from gau.evaluation.evaluator import Cancelled, Case, Evaluator, Run
from gau.evaluation.perplexity import Sums
from gau.evaluation.perplexity_by_position import PerplexityByPosition
from gau.models import decoding


class WholeDocuments(PerplexityByPosition):
    """`PerplexityByPosition` of documents from their first to their last token.

    Its cases are every split to the documents' ends, and at every context with the state forgotten after so many
    tokens. Options: `rows`, documents that are read side by side, and `block`, tokens of each that are read at once.
    """

    options = {'rows': 8, 'block': 2048}  # noqa: RUF012  frozen by what reads it

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Evaluator`; a field below 1; the model has no decoding state of constant size; or there are
            several processes.
        """
        super().__init__(run, name, entry)
        self.check_range('rows', 1)
        self.check_range('block', 1)
        if not run.objective.causal:
            raise UserError(f'evaluators.{name}: whole documents are read by causal models, which this one is not')
        decoding.check(run.model)
        keeper = decoding.what_keeps_all_tokens(run.model)
        if keeper is not None:
            raise UserError(
                f'evaluators.{name}: {keeper} keeps the keys and values of all tokens, and whole '
                'documents are read with a state of constant size; evaluate it at long contexts instead'
            )
        if jax.process_count() > 1:
            raise UserError(
                f'evaluators.{name}: whole documents are read by one process: start it without others, or with '
                '--distributed=off'
            )

    def cases(self, contexts: Sequence[int]) -> list[Case]:
        """Returns every split with the state carried to the ends, then with it forgotten every `context` tokens."""
        carried = [Case(split, split, None) for split in self.entry.splits]
        forgotten = [
            Case(f'{split}_{context}', split, context)
            for context in dict.fromkeys(contexts)
            for split in self.entry.splits
        ]
        return carried + forgotten

    def check(self) -> None:
        """Checks the splits; any context can be read."""
        Evaluator.check(self)

    def sums(self, params: Any, case: Case, cancelled: Callable[[], bool] = lambda: False) -> Sums:
        """Goes over the case once; see `measure`."""
        rows, sums, in_flight = _Rows(self._documents(case.split), self.entry.rows), Sums(), None
        state = decoding.init_state(self.run.model, batch_size=self.entry.rows)
        while (block := rows.take(self.entry.block, case.context)) is not None:
            if cancelled():
                raise Cancelled
            nll_BT, state = self._read(params, state, block)
            # One block is summed up on the host while the device reads the next.
            if in_flight is not None:
                _add(sums, *in_flight)
            in_flight = block, nll_BT
        if in_flight is not None:
            _add(sums, *in_flight)
        return sums

    def _documents(self, split: str) -> Iterator[np.ndarray]:
        """Yields the columns of `gau.data.examples` of one document after another, up to max_tokens in all."""
        columns = examples.lm_columns(self.run.tokenizer, sizes=True)
        left = self.entry.max_tokens or np.inf
        for documents in sources.open_split(self.run.config.data, split):
            for i in range(len(documents)):
                document = documents[i]
                if document is None:
                    continue
                table = columns([document])['tokens']
                table[0, examples.INPUTS] = self.run.tokenizer.bos_id  # where BEGIN stands
                yield table[: int(min(left, len(table)))]
                left -= len(table)
                if left <= 0:
                    return

    @cached_property
    def _read(self) -> Callable[[Any, Any, '_Block'], tuple[jax.Array, Any]]:
        """(params, state, block) -> losses [B, T] and the new state; rows that begin anew forget theirs first."""
        model = self.run.model

        def read(params, state, tokens_BT, targets_BT, length_B, fresh_B):
            def forgotten(x):
                return jnp.where(fresh_B.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)

            state = decoding.map_rows(forgotten, state, stacked=model.config.layer_stack == 'scan')
            h_BTD, state = decoding.extend(model, params, state, tokens_BT, length_B)
            return model.apply({'params': params}, h_BTD, targets_BT, method='losses'), state

        compiled = jax.jit(read, donate_argnums=1)

        def call(params, state, block):
            tokens_BT, targets_BT = (block.table_BT[..., column] for column in (examples.INPUTS, examples.TARGETS))
            return compiled(params, state, tokens_BT, targets_BT, block.length_B, block.position_B == 0)

        return call


class _Block(NamedTuple):
    """The next tokens of every row, padded on the right: columns [B, T, 4], how many are the row's, where they begin.

    A row's position counts the tokens that its state holds.
    """

    table_BT: np.ndarray
    length_B: np.ndarray
    position_B: np.ndarray


class _Rows:
    """Documents dealt out to the rows of a batch, each row reading one after the other."""

    def __init__(self, documents: Iterator[np.ndarray], rows: int):
        self._documents = documents
        self._current = [np.zeros((0, 4), np.int32)] * rows
        self._done = [0] * rows

    def take(self, most: int, context: int | None) -> _Block | None:
        """Returns the next tokens of every row, at most `most` and not past where the state is forgotten, or None."""
        table_BT = np.zeros((len(self._current), most, 4), np.int32)
        length_B, position_B = np.zeros((2, len(self._current)), np.int32)
        for b, document in enumerate(self._current):
            if self._done[b] == len(document):
                document = next(self._documents, document[:0])
                self._current[b], self._done[b] = document, 0
            done = self._done[b]
            position = done % context if context else done
            piece = document[done : done + (min(most, context - position) if context else most)]
            table_BT[b, : len(piece)], length_B[b], position_B[b] = piece, len(piece), position
            self._done[b] += len(piece)
        return _Block(table_BT, length_B, position_B) if length_B.any() else None


def _add(sums: Sums, block: _Block, nll_BT: jax.Array) -> None:
    places = np.arange(block.table_BT.shape[1])
    weights_BT = places < block.length_B[:, None]
    positions_BT = np.where(weights_BT, block.position_B[:, None] + places, 0)
    bytes_BT, words_BT = (block.table_BT[..., column] for column in (examples.BYTES, examples.WORDS))
    sums.add(np.asarray(nll_BT), weights_BT, positions_BT, {'target_bytes': bytes_BT, 'target_words': words_BT})
