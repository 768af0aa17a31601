"""Loss, perplexity per token and per word, and bits per byte."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.evaluation.evaluator import HOST_ONLY, BatchEvaluator, Case, Run

LN2 = math.log(2.0)


class Sums:
    """Sums over a case, and what is read off them.

    loss: nats over all targets; tokens, bytes, words: how many targets, and bytes and words of text they spell;
    by_position: [2, positions] nats and targets by the number of tokens that a target can look back on.
    """

    def __init__(self):
        self.loss = self.tokens = self.bytes = self.words = 0.0
        self.by_position = np.zeros((2, 0))

    def add(self, nll_BN: np.ndarray, weights_BN: np.ndarray, positions_BN: np.ndarray, sizes: Mapping[str, Any]):
        """Adds a batch.

        Args:
          nll_BN: nats per target.
          weights_BN: 1 where a target counts, 0 elsewhere.
          positions_BN: integers, tokens before each target.
          sizes: `target_bytes` and `target_words` [B, N]; masked targets spell no text of their own and have neither.
        """
        weights = weights_BN.astype(np.float64)
        losses = nll_BN.astype(np.float64) * weights
        bytes_, words = (
            np.sum(sizes[key], where=weights > 0, dtype=np.float64) if key in sizes else 0 for key in HOST_ONLY
        )
        self.loss += losses.sum()
        self.tokens += weights.sum()
        self.bytes += bytes_
        self.words += words
        counted = [np.bincount(positions_BN.ravel(), x.ravel()) for x in (losses, weights)]
        longer = max(0, len(counted[0]) - self.by_position.shape[1])
        self.by_position = np.pad(self.by_position, ((0, 0), (0, longer)))
        self.by_position[:, : len(counted[0])] += counted

    def metrics(self, context: int) -> Iterator[tuple[str, Any]]:
        """Yields the metrics; ratios without a denominator are null."""
        loss = self.loss / self.tokens if self.tokens else None
        yield 'loss', loss
        yield 'perplexity', _exp(loss)
        yield 'bits_per_byte', self.loss / LN2 / self.bytes if self.bytes else None
        yield 'perplexity_per_word', _exp(self.loss / self.words) if self.words else None
        yield 'tokens', round(self.tokens)
        yield 'bytes', round(self.bytes)
        yield 'context', context


def _exp(nats: float | None) -> float | None:
    # exp of a hopeless loss overflows a double; infinity is not JSON, so it reads as null.
    return math.exp(nats) if nats is not None and nats < 700 else None


class Perplexity(BatchEvaluator):
    """Loss (nats per token), perplexity, bits per byte and perplexity per word, which compare across tokenizers."""

    headline = ('loss', 'bits_per_byte')
    columns = ('context', 'tokens', 'loss', 'perplexity', 'bits_per_byte')

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Evaluator`; or the objective has no losses of tokens.
        """
        super().__init__(run, name, entry)
        if not hasattr(run.objective, 'token_losses'):
            raise UserError(
                f'evaluators.{name}.type={entry.type} is for objectives with a loss for each token, which '
                f'objective={run.config.objective} has not'
            )

    def outputs(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the nats per target, [B, N] float32."""
        return self.run.objective.token_losses(self.run.model, params, batch)

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields loss, perplexity, bits_per_byte, perplexity_per_word, tokens, bytes and context."""
        yield from self.sums(params, case, cancelled).metrics(case.context)

    def sums(self, params: Any, case: Case, cancelled: Callable[[], bool] = lambda: False) -> Sums:
        """Goes over the case once; see `measure`."""
        sums = Sums()
        for batch, nll_BN in self.batches(params, case, cancelled):
            positions_BN = batch.get('positions', np.broadcast_to(np.arange(case.context), nll_BN.shape))
            sums.add(nll_BN, batch['weights'], positions_BN, batch)
        return sums
