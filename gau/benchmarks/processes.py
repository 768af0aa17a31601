"""Cells in processes, one after the other, and what comes of all rounds of one cell.

A fresh process has a fresh allocator, so its peak of memory is the cell's own, and whatever it dies of ends there.
Decoding and prefill share one as long as it lives: their parameters and programs serve many cells. The
rounds A, B, C, A, B, C instead of A, A, B, B, C, C let a chip that slows down slow all of them alike.
"""

import contextlib
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

import numpy as np

from gau.benchmarks.cells import MATMUL, MEMORY, PASSES, RATES, SHARED, Cell

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


class Workers:
    """Measures cells in processes (`gau.benchmarks.worker`), of which one at most is there at a time.

    Attributes:
      environment: of the processes.
      log: file that the output of a process that crashed is appended to.
    """

    def __init__(self, environment: Mapping[str, str], log: Path):
        self.environment, self.log = environment, log
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> 'Workers':
        return self

    def __exit__(self, *_: object) -> None:
        self._end(kill=True)

    def measure(self, cell: Cell) -> Result:
        """Measures one cell; returns the result, with `error` in one line if there is none."""
        shared = cell.benchmark in SHARED
        if not shared:
            self._end()
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(cell)) + '\n')
            self._process.stdin.flush()
            line = self._results.readline()
        except BrokenPipeError:
            line = ''
        if line:
            if not shared:
                self._end()
            return json.loads(line)
        process, output = self._process, self._output
        self._end()
        output.seek(0)
        text = output.read()[-20_000:]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open('a') as stream:
            stream.write(f'{cell}\n{text}\n')
        if process.returncode < 0:
            return {'error': f'crashed: {signal.Signals(-process.returncode).name}'}
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return {'error': f'crashed: {lines[-1] if lines else f"exit code {process.returncode}"}'}

    def _start(self) -> None:
        read, write = os.pipe()
        self._results = os.fdopen(read)
        self._output = tempfile.TemporaryFile('w+')  # noqa: SIM115
        # -P: the directory that the user stands in has no business among the modules.
        command = [sys.executable, '-P', '-m', 'gau.benchmarks.worker', str(write)]
        streams = {'stdin': subprocess.PIPE, 'stdout': self._output, 'stderr': subprocess.STDOUT}
        self._process = subprocess.Popen(command, env=dict(self.environment), text=True, pass_fds=[write], **streams)
        os.close(write)

    def _end(self, *, kill: bool = False) -> None:
        if self._process is None:
            return
        if kill:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._results.close()
        self._process = None


def merge(cell: Cell, results: Sequence[Result]) -> Row:
    """Returns the row of a cell from its results, one a round: medians over all their samples."""
    spec = cell.spec._asdict() | {'overrides': dict(cell.spec.overrides)}
    row = {'benchmark': cell.benchmark, **spec, **dataclasses.asdict(cell)}
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
    if cell.benchmark in RATES:
        done = 'flops' if cell.benchmark == MATMUL else 'bytes'
        return row | {f'{done}_per_second': row.pop(done) / median}
    tokens = row.pop('tokens')
    row['tokens_per_second'] = tokens / median
    stem, steps = ('step_ms', 1) if cell.benchmark in PASSES else ('ms_per_token', tokens / cell.batch_size)
    p10, p90 = np.quantile(seconds, (0.1, 0.9)).tolist()
    for name, value in (('', median), ('_min', min(seconds)), ('_p10', p10), ('_p90', p90), ('_max', max(seconds))):
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

    Of decoding, the share that its bytes are of the measured rate of memory. They are None where the peak is unknown or
    the rate was not measured.
    """
    from gau.training.throughput import peak_flops_of

    rate = next((row['flops_per_second'] for row in rows if 'flops_per_second' in row), None)
    memory = next((row['bytes_per_second'] for row in rows if row['benchmark'] == MEMORY and 'error' not in row), None)
    for row in rows:
        if row['benchmark'] == 'decode' and 'bytes_per_second' in row:
            row['share_of_memory_rate'] = row['bytes_per_second'] / memory if memory else None
        if row['benchmark'] in PASSES and 'tokens_per_second' in row:
            flops = PASSES[row['benchmark']] * row['flops_per_token'] * row['tokens_per_second']
            peak = peak_flops_of(row['device'])
            row['mfu'] = flops / peak if peak else None
            row['share_of_matrix_rate'] = flops / rate if rate else None
