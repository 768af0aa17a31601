"""The paper's configurations on 64 TPU v4 chips, as their compiler sees them: a table in Markdown and rows in JSON."""

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gau.benchmarks import chips
from gau.benchmarks.compile_check import Row, check
from gau.training.config import default_config

TOPOLOGY = 'v4:4x4x4'
VOCAB_SIZE = 32_000
TOKENS_PER_STEP = 2**18
MODELS = ('flash', 'flash_quad', 'transformer_plus_plus')
CONTEXTS = (8192, 512, 2048, 4096, 1024)
# Of unrolled layers, as many as these are compiled, and all of them follow on a straight line.
FEW_LAYERS = (2, 4)

HEADER = """# The paper's configurations on 64 TPU v4 chips, as the compiler sees them

Written by `python scripts/compile_check.py --table={path}`; nothing ran on a TPU. libtpu compiled the training step
for v4:4x4x4, where a device is a chip of 30.75 GiB and 275 TFLOP/s. 2^18 tokens a step, a vocabulary of 32,000,
bfloat16, AdamW in float32, no recomputation but that of the op itself. A batch of 32 sequences of 8192 tokens has two
chips a sequence (mesh.sequence=2); size `large` (the 500 M of PG-19) is sharded over 32 (mesh.fsdp). All numbers are of
one device and one step. A call that was cut short goes on when it is given again; what it had not reached is not in the
table. Between two calls the code may have changed: the last column is the newest commit of `gau/` that a row was made
with, with a + if there were changes on top.

- scan: all layers in a scan, compiled as they are. unrolled (ours): models of {few} layers compiled, and the numbers of
  all layers on a straight line through the two.
- memory, of the scan: state and batch / temporaries / all (with code).
- TFLOP: matmuls as traced, with recomputation and masked halves / the model's by the closed form (docs/models.md).
- traffic: bytes read from and written to main memory. collectives, of the scan: number / MiB (payload).
- ms: a step = the compiler's cycles at 1.05 GHz + the collectives at 300 GB/s, unhidden (ours) + kernels of Pallas, of
  which the compiler has no cycles: what their FLOPs or their bytes take at least (ours). In JAX's splash attention, for
  `transformer_plus_plus`, these are the FLOPs of all blocks, and it passes over nearly half of them where it is causal.
  Where the compiler estimates nothing for some other operation, a bound in brackets: the longest of FLOPs, traffic and
  links (ours). MFU: of the closed form, by the unrolled step. Estimates, not measurements.

"""
COLUMNS = ('model', 'impl', 'objective', 'context', 'mesh', 'memory GiB', 'TFLOP', 'collectives', 'scan: traffic GiB')
COLUMNS += ('scan: ms', 'unrolled: traffic GiB', 'unrolled: ms', 'MFU', 'commit')


def configs() -> Iterator[ConfigDict]:
    """Yields the configurations of the table, unresolved: for each of its rows a scan, then few layers, unrolled."""
    # What says the most first: a call may be cut short.
    plan = [('base', 'lm', context, model) for context in CONTEXTS[:2] for model in (MODELS[0], MODELS[-1])]
    plan += [('base', 'lm', context, model) for context in CONTEXTS for model in MODELS]
    plan += [('large', 'lm', 8192, model) for model in MODELS]
    plan += [('base', 'mlm', context, model) for context in CONTEXTS for model in MODELS]
    for size, objective, context, model in dict.fromkeys(plan):
        for layers in (None, *FEW_LAYERS):
            config = default_config()
            config.model.name, config.model.size, config.model.num_layers = model, size, layers
            config.model.layer_stack = 'scan' if layers is None else 'unrolled'
            config.objective = objective
            config.data.context, config.data.batch_size = context, TOKENS_PER_STEP // context
            rows = min(64, config.data.batch_size)
            config.mesh.update({'data': 1, 'fsdp': 1, 'sequence': 64 // rows})
            config.mesh['fsdp' if size == 'large' else 'data'] = rows
            yield config


def write(path: Path, report: Callable[[str], None]) -> None:
    """Writes the table to `path` and what it is made of beside it (.jsonl), each as soon as it is there.

    What the file has already is kept, so that an interrupted call goes on.

    Args:
      path: of the Markdown file.
      report: is given every new row of the table.

    Raises:
      UserError: libtpu is missing.
    """
    target = chips.target(TOPOLOGY)
    lines, version = path.with_suffix('.jsonl'), _commit()
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    for config in configs():
        if any(_describes(row, config) for row in rows):
            continue
        rows.append({**check(config, target, vocab_size=VOCAB_SIZE).row, 'commit': version})
        rows.sort(key=lambda row: (_key(row), row['layer_stack'], row['num_layers']))
        lines.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        few = ' and '.join(map(str, FEW_LAYERS))
        path.write_text(HEADER.format(path=path, few=few) + table(rows))
        if config.model.num_layers == FEW_LAYERS[-1]:
            report(table([row for row in rows if _key(row) == _key_of(config)]).splitlines()[-1])


def _commit() -> str | None:
    """Returns the newest commit that touched this package, with a + for changes on top; None outside of git."""

    def git(*arguments: str) -> str:
        package = Path(__file__).parents[1]
        done = subprocess.run(['git', *arguments, '--', '.'], cwd=package, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git('log', '-1', '--format=%h') + ('+' if git('status', '--porcelain') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def _key(row: Row) -> tuple[Any, ...]:
    """Returns what one row of the table has in common."""
    return row['size'], row['objective'], row['context'], MODELS.index(row['model'])


def _key_of(config: ConfigDict) -> tuple[Any, ...]:
    return config.model.size, config.objective, config.data.context, MODELS.index(config.model.name)


def _describes(row: Row, config: ConfigDict) -> bool:
    model = config.model
    same = _key(row) == _key_of(config) and row['layer_stack'] == model.layer_stack
    # A scan has all layers, however many these are.
    return same and model.num_layers in (None, row['num_layers'])


def extrapolated(few: Row, more: Row, layers: int) -> Row:
    """Returns the numbers of a step with `layers` layers, on a straight line through steps with few and with more."""
    step = (layers - few['num_layers']) / (more['num_layers'] - few['num_layers'])

    def line(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else x + step * (y - x)

    row = {name: line(few[name], more[name]) for name in ('traffic_bytes', 'step_seconds_bound')}
    row['seconds'] = {name: line(few['seconds'][name], more['seconds'][name]) for name in few['seconds']}
    return row


def table(rows: list[Row]) -> str:
    """Returns the rows, three for each line, as a table in Markdown; lines that lack one are left out."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|---' * len(COLUMNS) + '|']
    for _, found in itertools.groupby(rows, key=_key):
        found = list(found)
        scan = [row for row in found if row['layer_stack'] == 'scan']
        unrolled = [row for row in found if row['layer_stack'] != 'scan']
        if scan and len(unrolled) == len(FEW_LAYERS):
            lines.append('| ' + ' | '.join(_cells(scan[0], *unrolled)) + ' |')
    return '\n'.join(lines) + '\n'


def _cells(scan: Row, few: Row, more: Row) -> list[str]:
    mesh = ', '.join(f'{axis} {size}' for axis, size in scan['mesh'].items() if size > 1)
    name = f'`{scan["model"]}`' + ('' if scan['size'] == 'base' else f' {scan["size"]}')
    flops = f'{scan["flops"] / 1e12:.2f} / {scan["model_flops"] / 1e12:.2f}'
    commits = ', '.join(dict.fromkeys(row['commit'] or '?' for row in (scan, few, more)))
    cells = [name, f'`{scan["impl"]}`', scan['objective'], str(scan['context']), mesh]
    if any('error' in row for row in (scan, few, more)):
        error = next(row['error'] for row in (scan, few, more) if 'error' in row)
        return [*cells, f'does not fit: {error}', flops, *[''] * 6, commits]
    unrolled = extrapolated(few, more, scan['num_layers'])
    total, peak = _total(unrolled), scan['flops'] / scan['seconds']['compute']
    mfu = f'{scan["model_flops"] / peak / total:.2f}' if total else ''
    return [
        *cells,
        ' / '.join(_gib(scan[f'{part}_bytes']) for part in ('argument', 'temporary', 'total')),
        flops,
        ', '.join(
            f'{kind} {found["count"]} / {found["bytes"] / 2**20:.0f}'
            for kind, found in sorted(scan['collectives'].items())
        ),
        *(_gib(scan['traffic_bytes']), _milliseconds(scan)),
        *(_gib(unrolled['traffic_bytes']), _milliseconds(unrolled)),
        mfu,
        commits,
    ]


def _total(row: Row) -> float | None:
    """Returns the seconds of a step, or None where the compiler estimates nothing."""
    parts = row['seconds']
    return None if parts['compiler'] is None else parts['compiler'] + parts['links'] + (parts['kernels'] or 0)


def _milliseconds(row: Row) -> str:
    total, parts = _total(row), row['seconds']
    if total is None:
        return f'({1e3 * row["step_seconds_bound"]:.1f})'
    summands = [parts['compiler'], parts['links'], *([parts['kernels']] if parts['kernels'] else [])]
    return f'{1e3 * total:.1f} = ' + ' + '.join(f'{1e3 * seconds:.1f}' for seconds in summands)


def _gib(size: float) -> str:
    return f'{size / 2**30:.2f}'
