"""Rows of measurements as tables for the terminal and as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gau.benchmarks.cells import MATMUL, PASSES, RATES, SHARED, label

Row = dict[str, Any]

WIDTH = 100
GIB = 2**30
MIB = 2**20
# The top of a panel is so many times its bottom at least: a few per cent between samples are to look like a few.
LEAST_SPAN = 4
# What one picture shows: a panel for each kind of row and field, with its unit; a field stands in for the one before.
_PICTURES = {
    'training': (
        ('train', ('tokens_per_second',), 1, 'tokens per second'),
        ('forward', ('tokens_per_second',), 1, 'tokens per second'),
        ('train', ('peak_bytes', 'compiler_bytes'), GIB, 'memory (GiB)'),
    ),
    'decoding': (
        ('decode', ('ms_per_token',), 1, 'ms for the next token'),
        ('decode', ('state_bytes',), MIB, 'state (MiB)'),
        ('prefill', ('tokens_per_second',), 1, 'prompt tokens per second'),
    ),
}
_HEADS = {
    'passes': 'context step ms     min-max k tok/s  MFU rate    GiB   plan comp s',
    'decoding': 'context batch ms/token       p10-p90  k tok/s  state MiB  MB/step  GB/s rate',
}
_DECODING_LEGEND = """p10-p90: all but the fastest and the slowest tenth of the samples. MB/step: bytes that a step must
read, parameters and what its rows look back on; GB/s: over its time; rate: over the rate of memory."""
_LEGEND = """k tok/s: thousand tokens a second. MFU: model FLOPs over the data sheet's peak; rate: over the
matrix rate. GiB: peak of the device's memory; plan: what the compiler planned. comp s: compiling."""


def brief(row: Row) -> str:
    """Returns the heart of a row in a few words."""
    if row['benchmark'] in RATES:
        return rate_line(row)
    what = f'{row["benchmark"]} {label(row)}, context {row["context"]}: '
    return what + (
        _cut(row['error'], 60) if 'error' in row else f'{_short(row["tokens_per_second"] / 1000)} k tokens/s'
    )


def rate_line(row: Row) -> str:
    """Returns a rate of this chip in words."""
    matmul = row['benchmark'] == MATMUL
    what = f'matrix rate, {row["context"]} x {row["context"]} in {row["dtype"]}'
    what = what if matmul else f'rate of memory, {row["context"]} MiB read and written'
    if 'error' in row:
        return f'{what}: {row["error"]}'
    rate = f'{row["flops_per_second"] / 1e12:.4g} TFLOP/s' if matmul else f'{row["bytes_per_second"] / 1e9:.0f} GB/s'
    return f'{what}: {rate} (median of {row["samples"]})'


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as text of at most WIDTH columns, a table for each kind of measurement."""
    blocks = []
    for kind in dict.fromkeys(row['benchmark'] for row in rows if row['benchmark'] not in RATES):
        passes = kind in PASSES
        head = _HEADS['passes' if passes else 'decoding']
        own = [row for row in rows if row['benchmark'] == kind]
        lines = [kind.ljust(WIDTH - len(head)) + head, '-' * WIDTH]
        for row in own:
            name, width = label(row), WIDTH - len(head)
            if len(name) >= width:
                lines.append(_cut(name, WIDTH))
                name = ''
            lines.append((name.ljust(width) + (_passes(row) if passes else _decoding(row))).rstrip())
        blocks.append('\n'.join(lines))
    blocks += [rate_line(row)[:WIDTH] for row in rows if row['benchmark'] in RATES]
    if any(row['benchmark'] in PASSES for row in rows):
        blocks.append(_LEGEND)
    if any(row['benchmark'] in SHARED for row in rows):
        blocks.append(_DECODING_LEGEND)
    blocks += [_kernels(row) for row in rows if row.get('profile')]
    return '\n\n'.join(blocks)


def _kernels(row: Row) -> str:
    profile, what = row['profile'], 'prompt' if row['benchmark'] == 'prefill' else 'step'
    lines = [
        f'{brief(row)}; of a {what} {profile["kernels"]:.0f} kernels in {profile["busy_us"]:.0f} us, '
        f'{profile["gaps_us"]:.0f} us between them'
    ]
    lines += [f'{microseconds:8.1f} us {number:6.1f} x {name}' for name, number, microseconds in profile['by_name']]
    return '\n'.join(_cut(line, WIDTH) for line in lines)


def _passes(row: Row) -> str:
    memory = ' '.join(_bytes(row.get(field)) for field in ('peak_bytes', 'compiler_bytes'))
    if 'error' in row:
        # What did not fit is told with the memory that was planned for it, anything else at more length.
        known = row.get('compiler_bytes') is not None
        return f'{row["context"]:7}  ' + (f'{_cut(row["error"], 35):35} {memory}' if known else _cut(row['error'], 55))
    spread = f'{_short(row["step_ms_min"])}-{_short(row["step_ms_max"])}'
    compiled = 'cached' if row.get('compile_cached') else _or_dash(row.get('compile_seconds'), '.1f')
    shares = ' '.join(f'{_or_dash(row.get(name), ".2f"):>{width}}' for name, width in _SHARES)
    speed = _short(row['tokens_per_second'] / 1000)
    return f'{row["context"]:7} {_short(row["step_ms"]):>7} {spread:>11} {speed:>7} {shares} {memory} {compiled:>6}'


def _decoding(row: Row) -> str:
    text = f'{row["context"]:7} {row["batch_size"]:5}'
    state = _or_dash(row.get('state_bytes') and row['state_bytes'] / MIB, '.1f')
    if 'error' in row:
        return f'{text}  {_cut(row["error"], 30):30} {state:>10}'
    # Reading is a thousand times as fast as writing.
    digits = 3 if row['ms_per_token'] >= 0.1 else 4
    median, least, most = (f'{row["ms_per_token" + end]:.{digits}f}' for end in ('', '_p10', '_p90'))
    speed = _short(row['tokens_per_second'] / 1000)
    size = _or_dash(row.get('bytes_per_step') and row['bytes_per_step'] / 1e6, '.0f')
    memory = _or_dash(row.get('bytes_per_second') and row['bytes_per_second'] / 1e9, '.0f')
    share = _or_dash(row.get('share_of_memory_rate'), '.2f')
    return f'{text} {median:>8} {f"{least}-{most}":>13} {speed:>8} {state:>10} {size:>8} {memory:>5} {share:>4}'


_SHARES = (('mfu', 4), ('share_of_matrix_rate', 4))


def _short(value: float) -> str:
    """Four digits, or three and a k for thousands."""
    if value >= 9999.5:
        return f'{value / 1000:.3g}k'
    return f'{value:.{max(0, 4 - len(str(int(value))))}f}'


def _bytes(value: float | None) -> str:
    return f'{_or_dash(value and value / GIB, ".2f"):>6}'


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + '...'


def _or_dash(value: float | None, form: str) -> str:
    return '-' if value is None else format(value, form)


def plot(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draws STEM_training.png and STEM_decoding.png over the context, where there is something to draw.

    Training: tokens/s of training and of the forward pass, and memory (the device's peak, or the compiler's plan where
    the device does not tell). Decoding: latency, state, and tokens/s of prefill. What did not fit is an open circle
    where the memory it asks for is known. Returns the paths.
    """
    paths = []
    for name, panels in _PICTURES.items():
        panels = [panel for panel in panels if any(row['benchmark'] == panel[0] and 'error' not in row for row in rows)]
        if panels:
            paths.append(stem.with_name(f'{stem.name}_{name}.png'))
            _draw(rows, panels, paths[-1])
    return paths


def _limits(low: float, high: float) -> tuple[float, float]:
    middle, half = (low * high) ** 0.5, LEAST_SPAN**0.5
    return min(low, middle / half), max(high, middle * half)


def _draw(rows: Sequence[Row], panels: Sequence[tuple], path: Path) -> None:
    # The object interface draws without a display and without pyplot's global state.
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # In all panels a model has its color, and a batch size that a curve is of has its line and marker.
    shown = [row for row in rows if row['benchmark'] in {kind for kind, *_ in panels}]
    models = list(dict.fromkeys(label(row) for row in shown))
    batches = [None, *sorted({row['batch_size'] for row in shown if row['benchmark'] not in PASSES})]
    figure = Figure(figsize=(5.2 * len(panels), 4.8), layout='constrained')
    entries = {}
    for number, (kind, fields, unit, what) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number, xlabel='context (tokens)', ylabel=what, title=kind)
        axes.grid(alpha=0.3)
        axes.set_xscale('log', base=2)
        axes.set_yscale('log')
        curves = _curves(shown, kind, fields, unit)
        values = [value for points in curves.values() for _, value, _ in points]
        few = max(values, default=1) > 1e4 * min(values, default=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,.10g}'))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for (model, batch), points in curves.items():
            points.sort()
            which = max(batches.index(batch) - 1, 0) % 4
            style = {'color': f'C{models.index(model)}', 'marker': 'os^D'[which], 'markersize': 5}
            dash = ('-', '--', ':', '-.')[which]
            fit = [point[:2] for point in points if point[2]]
            beyond = [point[:2] for point in points if not point[2]]
            axes.plot(*np.array(fit).reshape(-1, 2).T, dash, **style)
            key = models.index(model), batches.index(batch)
            text = model if batch is None else f'{model}, batch {batch}'
            entries[key] = Line2D([], [], linestyle=dash, label=text, **style)
            if beyond:
                axes.plot(*np.array(points)[:, :2].T, dash, color=style['color'], alpha=0.3)
                axes.plot(*np.array(beyond).T, linestyle='none', markerfacecolor='white', **style)
                entries[len(models), 0] = Line2D(
                    [], [], linestyle='none', marker='o', color='gray', markerfacecolor='white', label='did not fit'
                )
        axes.set_ylim(*_limits(*axes.get_ylim()))
    # Below the panels, where it hides no curve; a column is a model, where their names leave room.
    handles = [entries[key] for key in sorted(entries)]
    longest = max(len(handle.get_label()) for handle in handles)
    columns = min(len({model for model, _ in entries}), 4, max(int(5.2 * len(panels) / (0.5 + 0.075 * longest)), 1))
    figure.legend(handles=handles, loc='outside lower center', ncols=columns, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format='png')


def _curves(
    rows: Sequence[Row], kind: str, fields: Sequence[str], unit: int
) -> dict[tuple[str, int | None], list[tuple[int, float, bool]]]:
    """Returns points (context, value, whether it fitted) by model and batch size; None where the batch is the step's.

    Of what did not fit the memory may be known. Rows with other errors have no point.
    """
    curves: dict[tuple[str, int | None], list[tuple[int, float, bool]]] = {}
    for row in rows:
        value = next((row[field] for field in fields if row.get(field)), None)
        error = row.get('error')
        if row['benchmark'] == kind and value is not None and (not error or error.startswith('out of memory')):
            key = label(row), None if kind in PASSES else row['batch_size']
            curves.setdefault(key, []).append((row['context'], value / unit, not error))
    return curves


def _tokens(value: float) -> str:
    return f'{value / 1024:g} k' if value >= 1024 else f'{value:g}'
