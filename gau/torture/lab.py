"""The bench that faults are tried on: tiny inputs, the commands that a user gives, and their undisturbed results."""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
_TINY = {
    'model.num_layers': 1,
    'model.model_dim': 32,
    'model.chunk_size': 16,
    'data.context': 32,
    'data.batch_size': 2,
    'data.streams': 2,
    'steps': STEPS,
    'checkpoint.every_steps': 4,
    'eval.every_steps': 12,
    'eval.max_tokens': 200,
    'log.every_steps': 1,
}
# What depends on how fast a machine was.
_TIMINGS = ('tokens_per_second', 'step_seconds', 'mfu')
_WORDS = ('alpha', 'beta', 'gamma', 'delta', 'Zoë', '漢字', 'kill', 'run')
_GIVE_UP_SECONDS = 900
_SOON_SECONDS, _PATIENCE_SECONDS = 0.2, 40


# Frames below which a program answers in its own words.
_OUR_WORDS = re.compile(r'gau/cli\.py", line \d+, in (guarded|_parse_flags|run)\n')


class Stopped(Exception):
    """The campaign is over, and with it the programs that it has started."""


class Done:
    """How a program ended: exit code, what it printed, and whether a signal still met it running."""

    def __init__(self, process: subprocess.Popen, met: bool):
        self.out, self.err = process.communicate(timeout=_GIVE_UP_SECONDS)
        self.code, self.met = process.returncode, met
        # Whether it was left to end by itself when another process of its run had got a signal.
        self.left_alone = False


class Lab:
    """A directory to work in, a source of chance, and how long each command takes.

    Several may work in one directory at once: `another` shares all but the chance, and what has been made before.
    """

    def __init__(self, directory: Path, seed: int):
        """Writes the corpus into the directory, which is made."""
        self.directory, self.rng = Path(directory), random.Random(seed)
        self.corpus = self.directory / 'corpus'
        self.corpus.mkdir(parents=True)
        texts = random.Random(0)
        for number in range(8):
            lines = [' '.join(texts.choice(_WORDS) for _ in range(12)) for _ in range(60)]
            (self.corpus / f'{number}.txt').write_text('\n'.join(lines), encoding='utf-8')
        self._seconds: dict[str, float] = {}
        self._running: set[subprocess.Popen] = set()
        self._starting, self._stopped = threading.Lock(), threading.Event()
        self._numbers = iter(range(10**9))

    def new(self, name: str) -> Path:
        """Returns a path in the directory at which nothing is."""
        return self.directory / f'{name}_{next(self._numbers)}'

    def another(self, seed: str) -> 'Lab':
        """Returns a lab at the same bench, with a source of chance of its own."""
        other = copy.copy(self)
        other.rng = random.Random(seed)
        return other

    # The commands.

    def train(self, workdir: Path, *, processes: int = 1) -> list[str]:
        """Returns the arguments that train in `workdir`, on as many devices as processes."""
        fields = [f'--config.mesh.data={processes}'] + [f'--config.{field}={value}' for field, value in _TINY.items()]
        source = f'--config.data.source=tokens:{self.tokens}'
        return ['train.py', '--config=configs/lm.py:runlocal', source, *fields, f'--workdir={workdir}']

    def sweep(self, workdir: Path) -> list[str]:
        """Returns the arguments of a sweep of two points."""
        train = [argument for argument in self.train(workdir) if argument != 'train.py']
        return ['scripts/sweep.py', '--sweep=seed:2', *train]

    def prepare(self, output: Path) -> list[str]:
        """Returns the arguments that prepare the corpus into `output`."""
        source = f'--source=text:{self.corpus}/*.txt'
        return [
            *('scripts/prepare_data.py', source, '--text_unit=line', '--tokenizer=bytes', '--workers=2'),
            f'--output={output}',
        ]

    def evaluate(self, workdir: Path) -> list[str]:
        """Returns the arguments that evaluate the run in `workdir`."""
        return ['eval.py', f'--workdir={workdir}']

    def sample(self, workdir: Path) -> list[str]:
        """Returns the arguments that sample from the run in `workdir`."""
        return ['scripts/sample.py', f'--workdir={workdir}', '--prompt=kill', '--max_tokens=16']

    # Undisturbed results.

    @cached_property
    def tokens(self) -> Path:
        """The corpus prepared."""
        output = self.directory / 'tokens'
        self.must(self.prepare(output))
        return output

    @cached_property
    def trained(self) -> Path:
        """A finished run."""
        workdir = self.directory / 'trained'
        # Twice, since the first one compiles.
        self.must(self.train(self.new('compiled')))
        self.must(self.train(workdir))
        return workdir

    @cached_property
    def trained_by_two(self) -> Path:
        """A finished run of two processes."""
        workdir = self.directory / 'trained_by_two'
        for directory in (self.new('compiled'), workdir):
            begun = time.monotonic()
            for done in self.finish(self.start_two(self.train(directory, processes=2))):
                _assert_done(done, 'train.py on two processes')
            self._seconds['two'] = time.monotonic() - begun
        return workdir

    @cached_property
    def swept(self) -> dict[str, Any]:
        """The results of a finished sweep."""
        workdir = self.directory / 'swept'
        self.must(self.sweep(workdir))
        return sweep_results(workdir)

    @cached_property
    def row(self) -> dict[str, Any]:
        """What eval.py finds."""
        workdir = self.copy(self.trained)
        self.must(self.evaluate(workdir))
        return json_lines(workdir / 'eval.jsonl')[-1]

    @cached_property
    def text(self) -> str:
        """What sample.py writes."""
        return self.must(self.sample(self.trained)).out

    def copy(self, workdir: Path) -> Path:
        """Returns a copy of a run."""
        return shutil.copytree(workdir, self.new('copy'))

    # Programs.

    def start(
        self,
        arguments: Sequence[str],
        *,
        largest_file: int | None = None,
        clock: Sequence[float] = (),
        devices: int = 1,
    ) -> subprocess.Popen:
        """Starts a command.

        Args:
          arguments: of Python.
          largest_file: bytes beyond which writing fails, as on a full disk.
          clock: seconds by which the clock jumps every now and then.
          devices: that JAX simulates.

        Raises:
          Stopped: nothing is started any more.
        """
        if clock or largest_file is not None:
            program = _DISTURBED.format(jumps=list(clock), largest_file=largest_file, program=arguments[0])
            arguments = ['-c', program, *arguments[1:]]
        environment = {
            **os.environ,
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
            'PYTHONPATH': str(ROOT),
            'GAU_COMPILATION_CACHE': str(self.directory / 'compiled'),
            # Much is compiled and little is run.
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        }
        with self._starting:
            if self.stopped:
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Ctrl-C is for the campaign alone.
                start_new_session=True,
            )
            self._running.add(process)
        return process

    @property
    def stopped(self) -> bool:
        """Whether nothing starts any more."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Kills what is running, in which `Stopped` is raised wherever it is waited for; nothing starts any more."""
        with self._starting:
            self._stopped.set()
            for process in self._running:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

    def start_two(self, arguments: Sequence[str]) -> list[subprocess.Popen]:
        """Starts the two processes of one run."""
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        joined = [f'--coordinator_address=127.0.0.1:{port}', '--num_processes=2', '--heartbeat_seconds=10']
        return [self.start([*arguments, *joined, f'--process_id={number}']) for number in range(2)]

    def finish(self, processes: Sequence[subprocess.Popen]) -> list[Done]:
        """Waits for programs that nothing disturbs; returns how each ended."""
        return [self._end(process, met=False) for process in processes]

    def _end(self, process: subprocess.Popen, *, met: bool) -> Done:
        done = Done(process, met)
        self._running.discard(process)
        if self.stopped:
            raise Stopped
        return done

    def run(self, arguments: Sequence[str], **fault: Any) -> Done:
        """Runs a command to its end."""
        return self._end(self.start(arguments, **fault), met=False)

    def must(self, arguments: Sequence[str]) -> Done:
        """Runs a command that nothing disturbs, and remembers how long it takes; RuntimeError if it fails."""
        begun = time.monotonic()
        done = self.run(arguments)
        self._seconds[arguments[0]] = time.monotonic() - begun
        _assert_done(done, ' '.join(arguments))
        return done

    def signalled(
        self, processes: list[subprocess.Popen], name: str, signum: int, *, whom: Sequence[int] = (0,)
    ) -> list[Done]:
        """Sends a signal to some of the processes at a random moment; returns how all ended.

        Args:
          processes: just started.
          name: of what they run, whose duration is known.
          signum: the signal.
          whom: which of them get it.
        """
        whole = self._seconds[name]
        moment = time.monotonic() + self.rng.uniform(0.05, 0.95) * whole
        while time.monotonic() < moment and processes[0].poll() is None:
            time.sleep(0.005)
        met = all(process.poll() is None for process in processes)
        # The machine may be busier than it was, or less.
        self._seconds[name] *= 1.05 if met else 0.8
        for number in whom:
            processes[number].send_signal(signum)
        others = [process for number, process in enumerate(processes) if number not in whom]
        # A scheduler takes the rest of a job away a moment after one of its processes has died, or waits long.
        patience = _SOON_SECONDS if signum == signal.SIGKILL and self.rng.random() < 0.5 else _PATIENCE_SECONDS
        given_up = time.monotonic() + patience
        while any(process.poll() is None for process in others) and time.monotonic() < given_up:
            time.sleep(0.005)
        alone = [process not in others or process.poll() is not None for process in processes]
        for process in others:
            process.kill()
        ended = [self._end(process, met=met) for process in processes]
        for done, left_alone in zip(ended, alone, strict=True):
            done.left_alone = left_alone
        for done in ended:
            # Python itself answers Ctrl-C, with a traceback, as long as the program is still being imported.
            if done.err.rstrip().endswith('KeyboardInterrupt') and not _OUR_WORDS.search(done.err):
                done.err = 'interrupted at an import'
        return ended


# Runs a program that cannot write large files, or in whose eyes the clock jumps at every hundredth look.
_DISTURBED = """
import itertools, os, resource, runpy, sys, time
jumps, largest_file, program = {jumps}, {largest_file}, {program!r}
if jumps:
    looks, true_time, true_ns = itertools.count(), time.time, time.time_ns
    jump = lambda: jumps[next(looks) // 100 % len(jumps)]
    time.time = lambda: true_time() + jump()
    time.time_ns = lambda: true_ns() + int(jump() * 1e9)
if largest_file is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
sys.argv[0] = program
sys.path[0] = os.path.dirname(program)
runpy.run_path({program!r}, run_name='__main__')
"""


def _assert_done(done: Done, what: str) -> None:
    if done.code != 0:
        raise RuntimeError(f'undisturbed, {what} ended with {done.code}: {done.err[-2000:]}')


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file that are JSON, without what depends on how fast a machine was."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append({key: value for key, value in row.items() if key not in _TIMINGS})
    return rows


def sweep_results(workdir: Path) -> dict[str, Any]:
    """Returns what each point of a sweep has found."""
    finals = sorted(workdir.glob('*/final.json'))
    return {path.parent.name: json.loads(path.read_text())['eval'] for path in finals}


def checkpoints(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run."""
    directory = workdir / 'checkpoints'
    return sorted(int(path.name) for path in directory.glob('*') if path.name.isdecimal()) if directory.is_dir() else []


def same_files(one: Path, other: Path) -> bool:
    """Returns whether two directories hold the same names with the same bytes."""
    names = [sorted(path.relative_to(side) for path in side.rglob('*') if path.is_file()) for side in (one, other)]
    return names[0] == names[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


# Orbax's loops and threads are for one reader at a time.
_reading = threading.Lock()


def state_of(workdir: Path, reference: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a run's last checkpoint by their paths, whatever devices it was saved on.

    Which arrays there are the reference says: what Orbax notes of the devices may be what is damaged.
    """
    # Imported late, since programs are started from a process that needs none of it.
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    path, whole = (epath.Path(run / 'checkpoints' / str(STEPS) / 'state') for run in (workdir, reference))
    handler = ocp.PyTreeCheckpointHandler()
    with _reading:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(whole).tree)
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def compare_runs(workdir: Path, reference: Path, *, metrics: bool = True) -> str:
    """Says in what a run differs from an undisturbed one: state to the bit, metrics, result; nothing if in nothing."""
    found, expected = (state_of(run, reference) for run in (workdir, reference))
    if found.keys() != expected.keys():
        return 'parameters'
    changed = [name for name in found if not np.array_equal(found[name], expected[name])]
    if changed:
        return f'{len(changed)} arrays, {changed[0]} the first'
    if metrics and json_lines(workdir / 'metrics.jsonl') != json_lines(reference / 'metrics.jsonl'):
        return 'metrics.jsonl'
    results = [json.loads((run / 'final.json').read_text())['eval'] for run in (workdir, reference)]
    return '' if results[0] == results[1] else 'final.json'
