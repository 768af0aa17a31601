"""Which of the values that are asked for a model finds, by how far back they stand."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gau import plots
from gau.errors import UserError
from gau.evaluation.evaluator import BatchEvaluator, Case, Metrics, Run
from gau.objectives import recall as task


class Recall(BatchEvaluator):
    """Loss (nats a query), accuracy, and accuracy by distance in tokens, in ranges that double."""

    headline = ('loss', 'accuracy')
    columns = ('context', 'queries', 'loss', 'accuracy')
    figure = 'accuracy_by_distance'

    def __init__(self, run: Run, name: str, entry: ConfigDict):
        """Takes what every evaluator does.

        Raises:
          UserError: see `Evaluator`; or the objective is another one.
        """
        super().__init__(run, name, entry)
        if not isinstance(run.objective, task.Recall):
            raise UserError(f'evaluators.{name}.type={entry.type} is for objective=recall, not {run.config.objective}')

    def outputs(self, params: Any, batch: Mapping[str, jax.Array]) -> Any:
        """Returns nats of the queries, [B, P] float32, and whether the likeliest token is the value, [B, P] bool."""
        h_BPD, targets_BP, _ = task.at_queries(self.run.model, params, batch)
        logits_BPV = self.run.model.apply({'params': params}, h_BPD, method='logits')
        nll_BP = -jnp.take_along_axis(jax.nn.log_softmax(logits_BPV), targets_BP[..., None], axis=-1)[..., 0]
        return nll_BP, jnp.argmax(logits_BPV, axis=-1) == targets_BP

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields loss, accuracy, queries, context, and accuracy_by_distance: {first, last, accuracy, queries}."""
        pairs = task.check_pairs(self.run.config.data, case.context)
        losses, right, far = [], [], []
        for batch, (nll_BP, right_BP) in self.batches(params, case, cancelled):
            places_BP = batch['queries']
            asked_BP = np.take_along_axis(batch['weights'], places_BP, axis=1) > 0
            losses.append(nll_BP[asked_BP])
            right.append(right_BP[asked_BP])
            far.append(np.take_along_axis(task.distances(batch['inputs'], pairs), places_BP, axis=1)[asked_BP])
        losses, right, far = (np.concatenate(parts) for parts in (losses, right, far))
        yield 'loss', float(losses.mean(dtype=np.float64))
        yield 'accuracy', float(right.mean())
        yield 'queries', len(right)
        yield 'context', case.context
        yield 'accuracy_by_distance', list(_by_distance(right, far))

    def draw(self, measured: Mapping[Case, Metrics], path: Path, *, title: str) -> None:
        """Draws accuracy over the distance, a curve for each case."""
        figure, axes = plots.figure('tokens since the value', 'accuracy', title)
        for case, metrics in measured.items():
            rows = metrics['accuracy_by_distance']
            middles = [(row['first'] + row['last']) / 2 for row in rows]
            axes.plot(middles, [row['accuracy'] for row in rows], marker='.', label=case.name)
        axes.set_xscale('log', base=2)
        axes.set_ylim(0, 1)
        axes.legend()
        plots.save(figure, path)


def _by_distance(right: np.ndarray, far: np.ndarray) -> Iterator[dict[str, Any]]:
    first = 1
    while first <= far.max():
        inside = (far >= first) & (far < 2 * first)
        if inside.any():
            yield {
                'first': first,
                'last': 2 * first - 1,
                'accuracy': float(right[inside].mean()),
                'queries': int(inside.sum()),
            }
        first *= 2
