"""The pictures of runs, drawn from their own files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws loss over steps, training and every evaluated split, from the lines of metrics.jsonl."""
    figure, axes = _figure('step', 'loss (nats per token)', title)
    for split in sorted({row['split'] for row in rows}, key=lambda split: (split != 'train', split)):
        points = [(row['step'], row['loss']) for row in rows if row['split'] == split and row['loss'] is not None]
        if points:
            faint = split == 'train'
            axes.plot(*zip(*points, strict=True), label=split, marker=None if faint else 'o', alpha=0.6 if faint else 1)
    axes.legend()
    _save(figure, path)


def plot_loss_by_position(results: Sequence[Any], path: Path, *, title: str) -> None:
    """Draws the mean loss over the position in the context, in ranges that double, a curve for each evaluation."""
    figure, axes = _figure('tokens of context before the target', 'loss (nats per token)', title)
    for result in results:
        rows = result.by_position()
        middles = [(first + last) / 2 + 1 for first, last, _, _ in rows]
        axes.plot(middles, [loss for _, _, loss, _ in rows], marker='.', label=f'{result.split} at {result.context}')
    axes.set_xscale('log', base=2)
    axes.legend()
    _save(figure, path)


def plot_runs(losses: Mapping[str, Mapping[int, float]], path: Path, *, title: str) -> None:
    """Draws the losses of runs over steps, and below what each has more than the first.

    Args:
      losses: for each run, by name, its loss at every logged step.
      path: the PNG.
      title: of the picture.
    """
    figure, axes = _figure('', 'loss (nats per token)', title, rows=2)
    below = figure.add_subplot(2, 1, 2, xlabel='step', ylabel='more than the first', sharex=axes)
    below.grid(alpha=0.3)
    first = next(iter(losses.values()))
    for name, curve in losses.items():
        axes.plot(list(curve), list(curve.values()), label=name, linewidth=1)
        shared = [step for step in curve if step in first]
        below.plot(shared, [curve[step] - first[step] for step in shared], linewidth=1)
    axes.legend()
    _save(figure, path)


def _figure(xlabel: str, ylabel: str, title: str, *, rows: int = 1) -> tuple[Any, Any]:
    # The object interface draws without a display and without pyplot's global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5 + 2 * (rows - 1)), layout='constrained')
    axes = figure.add_subplot(rows, 1, 1, xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}')
    figure.savefig(aside, dpi=120, format='png')
    aside.replace(path)
