"""The paper's configurations on 64 TPU v4 chips, as their compiler sees them: a table in Markdown and rows in JSON."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from gau.benchmarks import chips
from gau.benchmarks.compile_check import Row, check
from gau.training.config import default_config

TOPOLOGY = 'v4:4x4x4'
VOCAB_SIZE = 32_000
TOKENS_PER_STEP = 2**18
MODELS = ('flash', 'flash_quad', 'transformer_plus_plus')
CONTEXTS = (8192, 512, 2048, 1024, 4096)

HEADER = """# The paper's configurations on 64 TPU v4 chips, as the compiler sees them

Written by `python scripts/compile_check.py --table={path}`; nothing ran on a TPU. libtpu compiled the training step
for v4:4x4x4, where a device is a chip of 30.75 GiB and 275 TFLOP/s. 2^18 tokens a step, a vocabulary of 32,000,
bfloat16, AdamW in float32, layers in a scan, no recomputation but that of the op itself, attention by XLA. A batch of
32 sequences of 8192 tokens has two chips a sequence (mesh.sequence=2); size `large` (the 500 M of PG-19) is sharded
over 32 (mesh.fsdp). All numbers are of one device and one step. A call that was cut short goes on when it is given
again; what it had not reached is not in the table. Between two calls the code may have changed: the last column is the
newest commit of `gau/` that a row was made with, with a + if there were changes on top.

- memory: state and batch / temporaries / all (with code).
- TFLOP: matmuls as traced, with recomputation and masked halves / the model's by the closed form (docs/models.md).
- traffic: bytes that the program reads from and writes to main memory (rows of commits before L29 of LOG.md count too
  many where layers are in a scan, and their bounds with them). collectives: number / MiB (payload).
- ms: the compiler's cycles at 1.05 GHz plus the collectives at 300 GB/s, unhidden; in brackets a bound below, the
  longest of FLOPs, traffic and links, which is all there is where the compiler estimates nothing for some kernel. MFU:
  of the closed form, by the same two. Estimates, not measurements.

"""
COLUMNS = ('model', 'objective', 'context', 'mesh', 'memory GiB', 'TFLOP', 'traffic GiB', 'collectives')
COLUMNS += ('ms', 'MFU', 'commit')


def configs() -> Iterator[ConfigDict]:
    """Yields the configurations of the table, unresolved."""
    # The longest and the shortest first: a call that is cut short has said the most.
    plan = [('base', objective, context) for context in CONTEXTS for objective in ('lm', 'mlm')]
    plan.insert(2, ('large', 'lm', 8192))
    for size, objective, context in plan:
        for model in MODELS:
            config = default_config()
            config.model.name, config.model.size, config.model.layer_stack = model, size, 'scan'
            config.objective = objective
            config.data.context, config.data.batch_size = context, TOKENS_PER_STEP // context
            rows = min(64, config.data.batch_size)
            config.mesh.update({'data': 1, 'fsdp': 1, 'sequence': 64 // rows})
            config.mesh['fsdp' if size == 'large' else 'data'] = rows
            yield config


def write(path: Path, report: Callable[[Row], None]) -> None:
    """Writes the table to `path` and its rows beside it (.jsonl), each as soon as it is there.

    Rows that the file has already are kept, so that an interrupted call goes on.

    Args:
      path: of the Markdown file.
      report: is given every new row.

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
        report(rows[-1])
        rows.sort(key=lambda row: (row['size'], row['objective'], row['context'], MODELS.index(row['model'])))
        lines.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        path.write_text(HEADER.format(path=path) + table(rows))


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


def _describes(row: Row, config: ConfigDict) -> bool:
    model = config.model
    wanted = (model.name, model.size, config.objective, config.data.context)
    return wanted == tuple(row[name] for name in ('model', 'size', 'objective', 'context'))


def table(rows: list[Row]) -> str:
    """Returns the rows as a table in Markdown."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|---' * len(COLUMNS) + '|']
    return '\n'.join([*lines, *('| ' + ' | '.join(_cells(row)) + ' |' for row in rows)]) + '\n'


def _cells(row: Row) -> list[str]:
    mesh = ', '.join(f'{axis} {size}' for axis, size in row['mesh'].items() if size > 1)
    name = f'`{row["model"]}`' + ('' if row['size'] == 'base' else f' {row["size"]}')
    flops = f'{row["flops"] / 1e12:.2f} / {row["model_flops"] / 1e12:.2f}'
    cells = [name, row['objective'], str(row['context']), mesh]
    if 'error' in row:
        return [*cells, f'does not fit: {row["error"]}', flops, '', '', '', '', row['commit'] or '']
    bound, known = f'{1e3 * row["step_seconds_bound"]:.1f}', row['seconds']['compiler'] is not None
    return [
        *cells,
        ' / '.join(_gib(row[f'{part}_bytes']) for part in ('argument', 'temporary', 'total')),
        flops,
        _gib(row['traffic_bytes']),
        ', '.join(
            f'{kind} {found["count"]} / {found["bytes"] / 2**20:.0f}'
            for kind, found in sorted(row['collectives'].items())
        ),
        f'{1e3 * row["step_seconds"]:.1f} ({bound})' if known else f'({bound})',
        f'{row["mfu"]:.2f} ({row["mfu_bound"]:.2f})' if known else f'({row["mfu_bound"]:.2f})',
        row['commit'] or '',
    ]


def _gib(size: int) -> str:
    return f'{size / 2**30:.2f}'
