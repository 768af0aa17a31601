"""The pictures of runs, drawn from their own files."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_loss(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draws loss over steps, training and every evaluated split, from the lines of metrics.jsonl."""
    canvas, axes = figure('step', 'loss (nats per token)', title)
    for split in sorted({row['split'] for row in rows}, key=lambda split: (split != 'train', split)):
        points = [(row['step'], row['loss']) for row in rows if row['split'] == split and row.get('loss') is not None]
        if points:
            faint = split == 'train'
            axes.plot(*zip(*points, strict=True), label=split, marker=None if faint else 'o', alpha=0.6 if faint else 1)
    axes.legend()
    save(canvas, path)


def plot_runs(losses: Mapping[str, Mapping[int, float]], path: Path, *, title: str) -> None:
    """Draws the losses of runs over steps, and below what each has more than the first.

    Args:
      losses: for each run, by name, its loss at every logged step.
      path: the PNG.
      title: of the picture.
    """
    canvas, axes = figure('', 'loss (nats per token)', title, rows=2)
    below = canvas.add_subplot(2, 1, 2, xlabel='step', ylabel='more than the first', sharex=axes)
    below.grid(alpha=0.3)
    first = next(iter(losses.values()))
    for name, curve in losses.items():
        axes.plot(list(curve), list(curve.values()), label=name, linewidth=1)
        shared = [step for step in curve if step in first]
        below.plot(shared, [curve[step] - first[step] for step in shared], linewidth=1)
    axes.legend()
    save(canvas, path)


def figure(xlabel: str, ylabel: str, title: str, *, rows: int = 1) -> tuple[Any, Any]:
    """Returns a figure of `rows` panels with the axes of the first; `save` writes it."""
    # The object interface draws without a display and without pyplot's global state.
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7, 4.5 + 2 * (rows - 1)), layout='constrained')
    axes = canvas.add_subplot(rows, 1, 1, xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    return canvas, axes


def shorten_numbers(axes: Any) -> None:
    """Writes the numbers along x as tables do, `20 M`, and not in powers of ten."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=' '))


def save(canvas: Any, path: Path) -> None:
    """Writes a PNG whole or not at all; the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}')
    for axes in canvas.axes:
        legend = axes.get_legend()
        named = [legend.get_title(), *legend.get_texts()] if legend else []
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *named):
            # Names of files and runs may hold dollar signs, which are no formulas.
            text.set_parse_math(False)
    with warnings.catch_warnings():
        # A letter that the font does not have is drawn as a box.
        warnings.filterwarnings('ignore', message='Glyph ')
        canvas.savefig(aside, dpi=120, format='png', metadata={'Software': None})
    aside.replace(path)
