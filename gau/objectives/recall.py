"""Multi-query associative recall: which value stood behind a key, asked of a model that has to look it up.

A row of N tokens begins with P pairs, a key and its value each, none of them twice. After them every key stands once
more, at a random place, and the target there is its value; all other places hold a filler and have no target. (After
Arora et al. 2023, "Zoology", section 3; there the distances follow a power law, here all places are alike.) A state of
one size can hold few pairs, keys and values hold all of them.

Rows are drawn from the seed and their number, without end and without files. `data.source` is `pairs:P`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.objectives.objective import Batch
from gau.objectives.text import TextObjective

FILLER = 0
# Keys are those below the half.
VOCABULARY = 1024
SOURCE = 'pairs:'
SPLITS = ('train', 'valid', 'test')
# Evaluated without a limit.
EVAL_ROWS = 1024
# Of an epoch, which a task without end has not; a round number of rows.
EPOCH_ROWS = 2**17


class Recall(TextObjective):
    """Language models that read keys and values; only the values that are asked for count."""

    causal = True
    rows = 'lm'
    evaluator = 'recall'
    targets = 'queries'

    def resolve_data(self, config: ConfigDict) -> ConfigDict:
        """Returns the section with what rows need checked; nothing else of it is read.

        Raises:
          UserError: another source than `pairs:P`, or more pairs than keys and places.
        """
        check_pairs(config)
        resolved = super().resolve_data(config)
        # A row is one text.
        resolved.attend_across_documents = True
        return resolved

    def tokenizer(self, config: ConfigDict) -> 'Alphabet':
        """There is no text."""
        return Alphabet()

    def identity(self, config: ConfigDict) -> dict[str, str]:
        """What is drawn depends on the seed and the source alone."""
        return {config.source: 'drawn'}

    def arrays(self, config: ConfigDict, *, rows: int, context: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Those of a language model, and `queries` [B, P], the places where a key stands again."""
        queries = {'queries': ((rows, check_pairs(config, context)), np.int32)}
        return super().arrays(config, rows=rows, context=context) | queries

    def build(self, config: ConfigDict, *, data: ConfigDict, tokenizer: Any, target: Any) -> Any:
        """Returns a language model. Raises UserError where queries do not divide over the shards of a sequence."""
        if check_pairs(data) % target.sequence_shards:
            raise UserError(f'data.source={data.source} does not divide over mesh.sequence={target.sequence_shards}')
        return super().build(config, data=data, tokenizer=tokenizer, target=target)

    def loss(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, dict]:
        """Returns the sum of the weights times nats; only the queries are scored against the vocabulary."""
        rngs = None if dropout_key is None else {'dropout': dropout_key}
        asked = at_queries(model, params, batch, deterministic=dropout_key is None, rngs=rngs)
        return model.apply({'params': params}, *asked, method='weighted_losses'), {}

    def check_split(self, config: ConfigDict, split: str) -> None:
        """Raises UserError unless the split is train, valid or test."""
        if split not in SPLITS:
            raise UserError(f'objective=recall has no split "{split}": {", ".join(SPLITS)}')

    def places_per_epoch(self, config: ConfigDict, tokenizer: Any) -> int:
        """Rows that are called an epoch."""
        return EPOCH_ROWS * config.context

    def train_batches(
        self, config: ConfigDict, *, tokenizer: Any, seed: int, rows: Sequence[int] | None = None
    ) -> 'Drawn':
        """Returns batches without end."""
        return Drawn(config, seed, range(config.batch_size) if rows is None else rows)

    def eval_batches(
        self, config: ConfigDict, *, tokenizer: Any, split: str, context: int, batch_size: int, max_tokens: int | None
    ) -> Iterator[Batch]:
        """Returns EVAL_ROWS rows, or as many as make `max_tokens` queries; the same at every call."""
        pairs = check_pairs(config, context)
        rows = EVAL_ROWS if max_tokens is None else max(max_tokens // pairs, 1)
        for first in range(0, rows, batch_size):
            numbers = range(first, first + batch_size)
            batch = stack(draw(pairs, context, (SPLITS.index(split), 0, number)) for number in numbers)
            batch['weights'][rows - first :] = 0
            yield batch


class Alphabet:
    """What stands for a tokenizer; sampling and export, which want text, are told that there is none."""

    vocab_size, fingerprint = VOCABULARY, f'recall {VOCABULARY}'

    def __getattr__(self, name: str) -> Any:
        """Raises UserError for what a tokenizer of text has."""
        if name.startswith('_'):
            raise AttributeError(name)
        raise UserError('objective=recall draws its rows: it has no text, and no tokenizer')


class Drawn:
    """Batch after batch: row r of batch b is drawn from the seed, b and r, on whichever process."""

    def __init__(self, config: ConfigDict, seed: int, rows: Sequence[int]):
        """Takes the section `data`, resolved, and which rows of every batch to draw."""
        self._pairs, self._context, self._seed, self._number = check_pairs(config), config.context, seed, 0
        self.rows, self.batch_size, self.rows_read = rows, config.batch_size, len(rows)

    def __next__(self) -> Batch:
        """Returns the next batch's rows."""
        first = self._number * self.batch_size
        self._number += 1
        return stack(draw(self._pairs, self._context, (0, self._seed + 1, first + row)) for row in self.rows)

    def get_state(self) -> dict[str, Any]:
        """Returns how many batches there have been; every process has the same."""
        return {'batches': self._number}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on behind them."""
        self._number = state['batches']

    def close(self) -> None:
        """Nothing is open."""


def check_pairs(config: ConfigDict, context: int | None = None) -> int:
    """Returns P of `data.source=pairs:P`.

    Raises:
      UserError: it says something else, or rows of the context, by default the config's, cannot hold them.
    """
    text = config.source.removeprefix(SOURCE)
    if not config.source.startswith(SOURCE) or not text.isdecimal() or int(text) < 1:
        raise UserError(
            f'data.source="{config.source}": objective=recall draws its rows, want pairs:P, such as pairs:64'
        )
    pairs, context = int(text), context or config.context
    if 3 * pairs > context or pairs > VOCABULARY // 2 - 1:
        raise UserError(
            f'data.source={config.source}: a pair takes 3 of {context} tokens and one of {VOCABULARY // 2 - 1} keys; '
            f'at most pairs:{min(context // 3, VOCABULARY // 2 - 1)}'
        )
    return pairs


def draw(pairs: int, context: int, seed: Sequence[int]) -> Batch:
    """Returns a row: inputs and targets int32 [N], weights float32 [N], and the places of the queries int32 [P]."""
    rng = np.random.default_rng(seed)
    half = VOCABULARY // 2
    keys_P = 1 + rng.choice(half - 1, pairs, replace=False)
    values_P = half + rng.integers(half, size=pairs)
    inputs_N = np.full(context, FILLER, np.int32)
    inputs_N[: 2 * pairs] = np.stack([keys_P, values_P], axis=1).reshape(-1)
    places_P = 2 * pairs + rng.choice(context - 2 * pairs, pairs, replace=False)
    inputs_N[places_P] = keys_P
    targets_N, weights_N = np.zeros(context, np.int32), np.zeros(context, np.float32)
    targets_N[places_P], weights_N[places_P] = values_P, 1
    return {'inputs': inputs_N, 'targets': targets_N, 'weights': weights_N, 'queries': places_P.astype(np.int32)}


def at_queries(model: Any, params: Any, batch: Mapping[str, Any], **dropout: Any) -> tuple[Any, Any, Any]:
    """Returns what the output layer reads of the queries, [B, P, D], their targets and weights [B, P]. Traced.

    Args:
      model: a language model.
      params: its parameters.
      batch: see `Recall.arrays`.
      **dropout: what `model.apply` is told of it.
    """
    import jax.numpy as jnp

    h_BND = model.apply({'params': params}, batch['inputs'], method='hidden', **dropout)
    places_BP = batch['queries']
    h_BPD = jnp.take_along_axis(h_BND, places_BP[..., None], axis=1)
    return h_BPD, *(jnp.take_along_axis(batch[name], places_BP, axis=1) for name in ('targets', 'weights'))


def stack(rows: Iterator[Batch]) -> Batch:
    """Returns rows as a batch."""
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def distances(inputs_BN: np.ndarray, pairs: int) -> np.ndarray:
    """Returns how many tokens lie between a key that is asked for and its value, and 0 elsewhere, [B, N]."""
    distances_BN = np.zeros(inputs_BN.shape, int)
    for row, inputs_N in enumerate(inputs_BN):
        keys_P, rest_M = inputs_N[: 2 * pairs : 2], inputs_N[2 * pairs :]
        order_P = np.argsort(keys_P)
        asked = np.flatnonzero(rest_M != FILLER)
        pair = order_P[np.searchsorted(keys_P, rest_M[asked], sorter=order_P)]
        distances_BN[row, 2 * pairs + asked] = 2 * pairs + asked - (2 * pair + 1)
    return distances_BN
