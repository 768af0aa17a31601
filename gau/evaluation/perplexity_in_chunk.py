"""Perplexity, and the loss by the place of a token in its chunk: where the border between two chunks hurts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.evaluation.evaluator import Case, Run
from gau.evaluation.perplexity import Sums
from gau.evaluation.perplexity_by_position import PerplexityByPosition, by_position


class PerplexityInChunk(PerplexityByPosition):
    """Perplexity with `loss_by_place` and `border_loss`, of all targets but those of the first chunk of each row.

    A token's place is how many tokens of its own chunk stand before it. `border_loss` is the mean loss over that of
    the second half of the chunks: what it costs that a chunk begins.

    Fields of an entry: `chunk`, tokens in a chunk, by default the model's; a model without chunks shows the same
    targets with nothing between them. `skip`, tokens at the start of every row that are left out, by default a chunk.
    """

    options: ClassVar[Mapping[str, int]] = {'chunk': 0, 'skip': 0}
    columns = ('context', 'tokens', 'loss', 'border_loss', 'bits_per_byte')
    figure = 'loss_by_place'
    ranges = 'loss_by_place'
    title = 'loss at place'
    axis = 'tokens of the same chunk before the target'

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Perplexity`; a field below 0; or a model without chunks, and no `chunk` given.
        """
        super().__init__(run, name, entry)
        self.check_range('chunk', 0)
        self.check_range('skip', 0)
        self.chunk = self.entry.chunk or run.config.model.get('chunk_size')
        if not self.chunk:
            raise UserError(f'evaluators.{name}.chunk must be given: {run.config.model.name} has no chunks of its own')
        self.skip = self.entry.skip or self.chunk

    def check_context(self, context: int) -> None:
        """See the base class: whether anything is left of a row."""
        if self.skip >= context:
            raise UserError(
                f'evaluators.{self.name}: skip={self.skip} leaves nothing of rows of {context} tokens; want less than '
                f'{context}, or longer ones'
            )

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields the metrics of `Perplexity`, `border_loss` and `loss_by_place`."""
        sums = self.sums(params, case, cancelled)
        yield from sums.metrics(case.context)
        losses, tokens = sums.by_position[:, self.chunk // 2 :].sum(1)
        yield 'border_loss', sums.loss / sums.tokens - losses / tokens if tokens else None
        yield self.ranges, by_position(*sums.by_position)

    def sums(self, params: Any, case: Case, cancelled: Callable[[], bool] = lambda: False) -> Sums:
        """Goes over the case once; the positions are the places."""
        sums, n = Sums(), np.arange(case.context)
        for batch, nll_BN in self.batches(params, case, cancelled):
            weights_BN = batch['weights'] * (n >= self.skip)
            sums.add(nll_BN, weights_BN, np.broadcast_to(n % self.chunk, nll_BN.shape), batch)
        return sums
