"""How many classes are right: accuracy, macro F1 and Matthews correlation over a whole split."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.evaluation.evaluator import BatchEvaluator, Case, Run


class Classification(BatchEvaluator):
    """Loss (nats), accuracy, F1 averaged over classes and Matthews correlation (scikit-learn's)."""

    headline = ('loss', 'accuracy')
    columns = ('context', 'examples', 'loss', 'accuracy', 'macro_f1', 'matthews')

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Evaluator`; or the objective has no classes.
        """
        super().__init__(run, name, entry)
        if not hasattr(run.objective, 'answers'):
            raise UserError(
                f'evaluators.{name}.type={entry.type} is for objectives with classes, which '
                f'objective={run.config.objective} has not'
            )

    def outputs(self, params: Any, batch: Mapping[str, jax.Array]) -> Any:
        """Returns the nats of the right class and the likeliest class, [B] each."""
        return self.run.objective.outputs(self.run.model, params, batch)

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields loss, accuracy, macro_f1, matthews, examples and context."""
        from sklearn import metrics

        losses, predicted, right = [], [], []
        for batch, (nll_B, predicted_B) in self.batches(params, case, cancelled):
            labels_B, weights_B = self.run.objective.answers(batch)
            counted_B = weights_B > 0
            for kept, of_batch in ((losses, nll_B), (predicted, predicted_B), (right, labels_B)):
                kept.append(of_batch[counted_B])
        losses, predicted, right = (np.concatenate(kept) for kept in (losses, predicted, right))
        yield 'loss', float(losses.mean(dtype=np.float64))
        yield 'accuracy', float(metrics.accuracy_score(right, predicted))
        yield 'macro_f1', float(metrics.f1_score(right, predicted, average='macro', zero_division=0))
        yield 'matthews', float(metrics.matthews_corrcoef(right, predicted))
        yield 'examples', len(right)
        yield 'context', case.context
