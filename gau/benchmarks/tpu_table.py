"""Models of base size on 64 TPU v4 chips, as their compiler sees them: a table in Markdown and rows in JSON."""

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gau.benchmarks import chips
from gau.benchmarks.compile_check import Row, check
from gau.models.architectures import BEST_FLASH
from gau.training.config import default_config

TOPOLOGY = 'v4:4x4x4'
VOCAB_SIZE = 32_000
TOKENS_PER_STEP = 2**18
# Names and fields of the models, which by their names alone are the paper's. What says the most is compiled first: a
# call may be cut short.
MODELS = (('flash', BEST_FLASH), ('flash', {}), ('transformer_plus_plus', {}), ('flash_quad', {}))
CONTEXTS = (512, 8192)
STACKS = ('unrolled', 'scan')

HEADER = """# Base-size models on 64 TPU v4 chips, as the compiler sees them

Written by `python scripts/compile_check.py --table={path}`; nothing ran on a TPU. libtpu
compiled the training step for v4:4x4x4, where a device is a chip of 30.75 GiB and 275 TFLOP/s: base size, language
modelling, 2^18 tokens a step, a vocabulary of 32,000, bfloat16, AdamW in float32, no recomputation but that of the op
itself and, in a scan, of the norms. A batch of 32 sequences of 8192 tokens has two chips a sequence (mesh.sequence=2).
All numbers are of one device and one step. Every program was compiled as it is, with all of its layers, once unrolled
(`model.layer_stack`) and once scanned. A call that was cut short goes on when it is given again; what it had not
reached is not in the table. Between two calls the code may have changed: the last column is the newest commit of `gau/`
that a line was made with, with a + for changes on top.

Where a line says "2 chunks", `flash` is that of configs/lm.py: shifted keys, a scalar gate on the state, a window of
two chunks of 128. All other lines are of the paper's units. configs/lm.py also takes Muon, which these steps do not.

- TFLOP: matmuls as traced, with recomputation and masked halves / the model's by the closed form (docs/models.md).
- memory GiB: state and batch / temporaries / all (with code). traffic GiB: read from and written to main memory.
- ms, MFU: a step = the compiler's cycles at 1.05 GHz + the collectives at 300 GB/s, unhidden (ours) + kernels of
  Pallas, of which the compiler has no cycles: what their FLOPs or their bytes take at least (ours). In JAX's splash
  attention, for `transformer_plus_plus`, these are the FLOPs of all blocks, and it passes over nearly half of them
  where it is causal. Where the compiler estimates nothing for some other operation, a bound in brackets: the longest of
  FLOPs, traffic and links (ours). MFU: of the closed form. Estimates, not measurements.
- s: what the compiler took, on two CPU cores that others used too.

"""
COLUMNS = ('model, layers', 'impl', 'context', 'mesh', 'TFLOP')
COLUMNS += tuple(f'{stack}: {what}' for stack in STACKS for what in ('memory GiB', 'traffic GiB', 'ms, MFU', 's'))
COLUMNS += ('commit',)


def configs() -> Iterator[ConfigDict]:
    """Yields the configurations of the table, unresolved: for each of its lines unrolled layers, then a scan."""
    # By their numbers in MODELS.
    plan = [(context, model) for model in range(3) for context in CONTEXTS]
    plan += [(context, model) for context in CONTEXTS for model in range(len(MODELS))]
    for (context, model), stack in itertools.product(dict.fromkeys(plan), STACKS):
        config = default_config()
        config.model.name, fields = MODELS[model]
        config.model.update(fields)
        config.model.layer_stack = stack
        config.data.context, config.data.batch_size = context, TOKENS_PER_STEP // context
        rows = min(64, config.data.batch_size)
        config.mesh.update({'data': rows, 'fsdp': 1, 'sequence': 64 // rows})
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
        if (config.model.layer_stack, *_key_of(config)) in {(row['layer_stack'], *_key(row)) for row in rows}:
            continue
        row = check(config, target, vocab_size=VOCAB_SIZE).row
        rows.append({**row, 'fields': _fields(config), 'commit': version})
        rows.sort(key=lambda row: (_key(row), row['layer_stack']))
        lines.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        path.write_text(HEADER.format(path=path) + table(rows))
        for line in table([row for row in rows if _key(row) == _key_of(config)]).splitlines()[2:]:
            report(line)


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


def _key(row: Row) -> tuple[int, int]:
    """Returns what one line of the table has in common. (Rows of before there were two FLASH name no fields.)"""
    return row['context'], MODELS.index((row['model'], row.get('fields', {})))


def _key_of(config: ConfigDict) -> tuple[int, int]:
    return config.data.context, MODELS.index((config.model.name, _fields(config)))


def _fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of an unresolved config that tell the lines of one model apart."""
    return {name: config.model[name] for name in BEST_FLASH if config.model[name] is not None}


def table(rows: list[Row]) -> str:
    """Returns the rows, two for each line, as a table in Markdown; lines that lack one are left out."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|---' * len(COLUMNS) + '|']
    for _, found in itertools.groupby(sorted(rows, key=_key), key=_key):
        stacks = {row['layer_stack']: row for row in found}
        if stacks.keys() == set(STACKS):
            lines.append('| ' + ' | '.join(_cells(**stacks)) + ' |')
    return '\n'.join(lines) + '\n'


def _cells(unrolled: Row, scan: Row) -> list[str]:
    mesh = ', '.join(f'{axis} {size}' for axis, size in scan['mesh'].items() if size > 1)
    flops = f'{scan["flops"] / 1e12:.2f} / {scan["model_flops"] / 1e12:.2f}'
    commits = ', '.join(dict.fromkeys(row['commit'] or '?' for row in (unrolled, scan)))
    window = f', {chunks} chunks' if (chunks := scan.get('fields', {}).get('local_window')) else ''
    cells = [f'`{scan["model"]}`, {scan["num_layers"]}{window}', f'`{scan["impl"]}`', str(scan['context']), mesh, flops]
    for row in (unrolled, scan):
        if 'error' in row:
            cells += [f'does not fit: {row["error"]}', '', '', '']
            continue
        total, peak = _total(row), row['flops'] / row['seconds']['compute']
        mfu = f', {row["model_flops"] / peak / total:.2f}' if total else ''
        cells += [
            ' / '.join(_gib(row[f'{part}_bytes']) for part in ('argument', 'temporary', 'total')),
            _gib(row['traffic_bytes']),
            _milliseconds(row) + mfu,
            f'{row["compile_seconds"]:.0f}',
        ]
    return [*cells, commits]


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
