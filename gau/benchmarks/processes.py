"""Cells in processes of their own, one after the other, and what comes of all rounds of one cell.

A fresh process has a fresh allocator, so its peak of memory is the cell's own, and whatever it dies of ends there. The
rounds A, B, C, A, B, C instead of A, A, B, B, C, C let a chip that slows down slow all of them alike.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gau.benchmarks.cells import MATMUL, PASSES, Cell

Result = dict[str, Any]
Row = dict[str, Any]

_ROOT = Path(__file__).resolve().parents[2]
_CACHES = ('GAU_COMPILATION_CACHE', 'JAX_COMPILATION_CACHE_DIR')


def environment(cache: Path) -> dict[str, str]:
    """Returns the environment of the processes: this one's, with what a measurement wants where it says nothing.

    Compiled programs are shared between the rounds, in `cache` unless a cache is named already, so that the first round
    tells how long compiling takes and the others need not. JAX takes nine tenths of the memory at once, not three
    quarters: nobody else is there.
    """
    own = {'TORCHINDUCTOR_CACHE_DIR': str(cache / 'torch'), 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9'}
    if not any(name in os.environ for name in _CACHES):
        own['GAU_COMPILATION_CACHE'] = str(cache / 'jax')
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    return own | os.environ | {'PYTHONPATH': path}


def run_cell(cell: Cell, *, environment: Mapping[str, str], log: Path) -> Result:
    """Measures one cell in a process of its own; returns the result, with `error` in one line if there is none.

    Args:
      cell: what to measure.
      environment: of the process.
      log: file that the stderr of a process that crashed is appended to.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / 'result.json'
        # -P: the directory that the user stands in has no business among the modules.
        command = [sys.executable, '-P', '-m', 'gau.benchmarks.worker', json.dumps(dataclasses.asdict(cell)), str(file)]
        process = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
        if process.returncode == 0 and file.is_file():
            return json.loads(file.read_text())
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as stream:
        stream.write(f'{cell}\n{process.stdout[-10_000:]}{process.stderr[-10_000:]}\n')
    if process.returncode < 0:
        return {'error': f'crashed: {signal.Signals(-process.returncode).name}'}
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    return {'error': f'crashed: {lines[-1] if lines else f"exit code {process.returncode}"}'}


def merge(cell: Cell, results: Sequence[Result]) -> Row:
    """Returns the row of a cell from its results, one a round: medians over all their samples."""
    row = {'benchmark': cell.benchmark, **cell.spec._asdict(), **dataclasses.asdict(cell)}
    del row['spec'], row['effort'], row['profile']
    first = results[0]
    row |= {name: value for name, value in first.items() if name not in ('seconds', 'launch_seconds')}
    row['rounds'] = len(results)
    failed = next((result for result in results if 'error' in result), None)
    if failed:
        return row | {'error': failed['error']}
    seconds = [second for result in results for second in result['seconds']]
    median = statistics.median(seconds)
    row['samples'] = len(seconds)
    # What drifted from round to round.
    row['round_ms'] = [1000 * statistics.median(result['seconds']) for result in results]
    if cell.benchmark == MATMUL:
        return row | {'flops_per_second': row.pop('flops') / median}
    tokens = row.pop('tokens')
    row['tokens_per_second'] = tokens / median
    stem, steps = ('step_ms', 1) if cell.benchmark in PASSES else ('ms_per_token', tokens / cell.batch_size)
    for name, value in (('', median), ('_min', min(seconds)), ('_max', max(seconds))):
        row[stem + name] = 1000 * value / steps
    if 'bytes_per_step' in row:
        row['bytes_per_second'] = 1000 * row['bytes_per_step'] / row[stem]
    launches = [second for result in results for second in result.get('launch_seconds', ())]
    if launches:
        row['host_ms'] = 1000 * statistics.median(launches)
    peaks = [result['peak_bytes'] for result in results if result.get('peak_bytes')]
    if peaks:
        row['peak_bytes'] = max(peaks)
    return row


def add_utilisation(rows: Sequence[Row]) -> None:
    """Adds the shares that a row's model FLOPs are of the chip's peak (`mfu`) and of its measured matrix rate.

    They are None where the peak is unknown or the rate was not measured.
    """
    from gau.training.throughput import peak_flops_of

    rate = next((row['flops_per_second'] for row in rows if 'flops_per_second' in row), None)
    for row in rows:
        if row['benchmark'] in PASSES and 'tokens_per_second' in row:
            flops = PASSES[row['benchmark']] * row['flops_per_token'] * row['tokens_per_second']
            peak = peak_flops_of(row['device'])
            row['mfu'] = flops / peak if peak else None
            row['share_of_matrix_rate'] = flops / rate if rate else None
