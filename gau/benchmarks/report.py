"""Rows of measurements as a table for the terminal and as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as text, under 100 columns."""
    lines = [
        f'{"what":8} {"model":24} {"context":>8} {"batch":>5} {"ms/token":>9} {"min-max":>13} {"tokens/s":>11} '
        f'{"state MiB":>10}'
    ]
    for row in rows:
        head = f'{row["benchmark"]:8} {row["model"]:24} {row["context"]:8} {row["batch_size"]:5} '
        state = f'{row["state_bytes"] / 2**20:10.1f}'
        if 'error' in row:
            lines.append(f'{head}{row["error"][:35]:>35} {state}')
            continue
        spread = f'{row["ms_per_token_min"]:.3f}-{row["ms_per_token_max"]:.3f}'
        lines.append(f'{head}{row["ms_per_token"]:9.3f} {spread:>13} {row["tokens_per_second"]:11,.0f} {state}')
    return '\n'.join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws latency, or tokens/s of prefill, and size of the state over the context, for each model and batch."""
    from matplotlib.figure import Figure

    kinds = sorted({row['benchmark'] for row in rows})
    panels = [(kind, 'ms_per_token' if kind == 'decode' else 'tokens_per_second') for kind in kinds]
    if 'decode' in kinds:
        panels.append(('decode', 'state_bytes'))
    labels = {
        'ms_per_token': 'ms for the next token',
        'tokens_per_second': 'prompt tokens per second',
        'state_bytes': 'state (MiB)',
    }
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout='constrained')
    for number, (kind, field) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number, xlabel='context (tokens)', ylabel=labels[field], title=kind)
        axes.grid(alpha=0.3)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log')
        own = [row for row in rows if row['benchmark'] == kind and field in row]
        for model, batch in dict.fromkeys((row['model'], row['batch_size']) for row in own):
            points = [
                (row['context'], row[field] / (2**20 if field == 'state_bytes' else 1))
                for row in own
                if (row['model'], row['batch_size']) == (model, batch)
            ]
            axes.plot(*zip(*points, strict=True), marker='o', label=f'{model}, batch {batch}')
        if own:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format='png')
