"""Perplexity, and the loss by how long ago the same pair of tokens stood in the context: what exact recall is worth."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.evaluation.evaluator import Case, Run
from gau.evaluation.perplexity import Sums
from gau.evaluation.perplexity_by_position import PerplexityByPosition, by_position


class PerplexityByRepetition(PerplexityByPosition):
    """Perplexity with `new_loss`, `repeated_loss` and `loss_by_distance`.

    A target is repeated if it has followed the same token before, in the context that the model sees: whoever finds
    that place can copy it (Arora et al. 2023, arXiv 2312.04927). Its distance is how many tokens ago it
    did so for the last time; a new target has the distance 0. A model that keeps every token can find a pair at any
    distance, one with a state only what the state has kept.
    """

    columns = ('context', 'tokens', 'loss', 'new_loss', 'repeated_loss', 'bits_per_byte')
    figure = 'loss_by_distance'
    ranges = 'loss_by_distance'
    title = 'loss at distance'
    axis = 'tokens since the same pair of tokens (1: none)'

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Perplexity`; or a masked model, whose targets are not what comes next.
        """
        super().__init__(run, name, entry)
        if not run.objective.causal:
            raise UserError(f'evaluators.{name}.type={entry.type} is for causal models: a target must come next')

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields the metrics of `Perplexity`, `new_loss`, `repeated_loss` and `loss_by_distance`."""
        sums = self.sums(params, case, cancelled)
        yield from sums.metrics(case.context)
        (new_loss, loss), (new, repeated) = ((x[0], x[1:].sum()) for x in sums.by_position)
        yield 'new_loss', new_loss / new if new else None
        yield 'repeated_loss', loss / repeated if repeated else None
        yield self.ranges, by_position(*sums.by_position)

    def sums(self, params: Any, case: Case, cancelled: Callable[[], bool] = lambda: False) -> Sums:
        """Goes over the case once; the positions are the distances."""
        sums = Sums()
        for batch, nll_BN in self.batches(params, case, cancelled):
            ids_BN = batch.get('segment_ids', np.ones_like(batch['inputs']))
            distances_BN = np.stack(
                [distances(*row) for row in zip(batch['inputs'], batch['targets'], ids_BN, strict=True)]
            )
            sums.add(nll_BN, batch['weights'], distances_BN, batch)
        return sums


def distances(inputs_N: np.ndarray, targets_N: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
    """Returns for each target how many tokens ago it followed the same input in the same document, int [N]; 0: never.

    Args:
      inputs_N: tokens of a row.
      targets_N: the token after each.
      ids_N: documents and padding (see gau.ops).
    """
    last, found_N = {}, np.zeros(len(inputs_N), int)
    for n, pair in enumerate(zip(ids_N.tolist(), inputs_N.tolist(), targets_N.tolist(), strict=True)):
        found_N[n] = n - last.get(pair, n)
        last[pair] = n
    return found_N
