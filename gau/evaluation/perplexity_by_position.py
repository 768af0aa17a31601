"""Perplexity, and the loss by the number of tokens that a target can look back on, in ranges that double."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gau import plots
from gau.evaluation.evaluator import Case, Metrics
from gau.evaluation.perplexity import Perplexity


class PerplexityByPosition(Perplexity):
    """Perplexity with one more metric, which costs nothing: `loss_by_position`, see `by_position`.

    Attributes:
      ranges: name of that metric.
      title: of its table.
      axis: what it is over, in the figure.
    """

    figure = 'loss_by_position'
    ranges: ClassVar[str] = 'loss_by_position'
    title: ClassVar[str] = 'loss at context'
    axis: ClassVar[str] = 'tokens of context before the target'

    def measure(
        self, params: Any, case: Case, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yields the metrics of `Perplexity` and `loss_by_position`."""
        sums = self.sums(params, case, cancelled)
        # Without a context, texts are read to their ends, and the longest counts.
        yield from sums.metrics(case.context or sums.by_position.shape[1])
        yield self.ranges, by_position(*sums.by_position)

    def draw(self, measured: Mapping[Case, Metrics], path: Path, *, title: str) -> None:
        """Draws the mean loss over the position, a curve for each case."""
        figure, axes = plots.figure(self.axis, 'loss (nats per token)', title)
        for case, metrics in measured.items():
            rows = metrics[self.ranges]
            middles = [(row['first'] + row['last']) / 2 + 1 for row in rows]
            label = f'{case.split} at {metrics["context"]}'
            axes.plot(middles, [row['loss'] for row in rows], marker='.', label=label)
        axes.set_xscale('log', base=2)
        axes.legend()
        plots.save(figure, path)

    def table(self, measured: Mapping[Case, Metrics]) -> str:
        """Returns the table of the metrics and that of the losses by position."""
        columns = [
            {(row['first'], row['last']): row['loss'] for row in metrics[self.ranges]} for metrics in measured.values()
        ]
        titles = (f'{case.split[:6]:>6}@{metrics["context"]:<6}' for case, metrics in measured.items())
        lines = [f'{self.title:16} ' + ' '.join(titles)]
        for first, last in sorted({key for column in columns for key in column}):
            name = str(first) if first == last else f'{first}-{last}'
            losses = (column.get((first, last)) for column in columns)
            cells = (f'{"-":>13}' if loss is None else f'{loss:13.4f}' for loss in losses)
            lines.append(f'{name:16} ' + ' '.join(cells))
        return super().table(measured) + '\n\n' + '\n'.join(lines)


def by_position(losses: np.ndarray, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Returns {first, last, loss (mean), tokens} for positions in ranges that double: 0, 1, 2-3, 4-7, ...

    Args:
      losses: [positions] nats of all targets there.
      tokens: [positions] how many they are; ranges without any are left out.
    """
    rows, first = [], 0
    while first < len(tokens):
        last = min(max(2 * first, 1), len(tokens))
        count = tokens[first:last].sum()
        if count:
            mean = float(losses[first:last].sum() / count)
            rows.append({'first': first, 'last': last - 1, 'loss': mean, 'tokens': round(count)})
        first = last
    return rows
