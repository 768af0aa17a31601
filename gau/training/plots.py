"""The pictures of a run, drawn from its own files."""

from collections.abc import Sequence
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


def _figure(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    # The object interface draws without a display and without pyplot's global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}')
    figure.savefig(aside, dpi=120, format='png')
    aside.replace(path)
