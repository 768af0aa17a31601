"""Runs of several processes on this machine: CPU devices that XLA simulates, collectives through gloo."""

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

TINY = [
    '--config=configs/quickstart.py:runlocal',
    '--config.model.num_layers=1',
    '--config.model.model_dim=32',
    '--config.data.batch_size=4',
    '--config.data.context=64',
    '--config.steps=12',
    '--config.checkpoint.every_steps=5',
    '--config.eval.every_steps=4',
    '--config.eval.max_tokens=500',
    '--config.log.every_steps=1',
]

# train.py, of which process PROCESS does DEED, once, when its loop has come to step STEP.
_WITH_DEED = """
import os, signal
import train
from gau import cli
from gau.training import distributed, loop
settle = loop._Loop.settle
to_do = [True]
def settle_and(self):
    settle(self)
    if to_do and self.step == STEP and distributed.jax.process_index() == PROCESS:
        to_do.clear()
        DEED
loop._Loop.settle = settle_and
cli.run(train.main)
"""


def train_with(deed: str, *, step: int, process: int = 0) -> list[str]:
    """Returns the arguments that start train.py so that one process does something at a step."""
    program = _WITH_DEED.replace('DEED', deed).replace('PROCESS', str(process)).replace('STEP', str(step))
    return ['-c', program]


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> list[str]:
    """Returns the arguments that ask for a mesh."""
    sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor, 'sequence': sequence}
    return [f'--config.mesh.{axis}={size}' for axis, size in sizes.items()]


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts one process with so many devices."""
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_processes(*arguments: str, devices: int, count: int = 2, own: dict[int, list[str]] | None = None) -> list:
    """Starts the processes of one run, each with so many devices; `own` arguments by process."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    joined = [f'--coordinator_address=127.0.0.1:{port}', f'--num_processes={count}']
    return [
        start(*arguments, *(own or {}).get(index, ()), *joined, f'--process_id={index}', devices=devices)
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen], *, timeout: float = 1200) -> list[tuple[int, str, str]]:
    """Waits for all; returns exit code, stdout and stderr of each."""
    deadline = time.monotonic() + timeout
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


def run(*arguments: str, devices: int = 1, count: int = 1, **kwargs) -> list[tuple[int, str, str]]:
    """Runs one process, or several that are joined, to the end."""
    if count == 1:
        return finish([start(*arguments, devices=devices)])
    return finish(start_processes(*arguments, devices=devices, count=count, **kwargs))


def assert_done(results: list[tuple[int, str, str]]) -> None:
    """Fails with what the processes said unless all ended well."""
    assert [code for code, _, _ in results] == [0] * len(results), '\n'.join(err[-2000:] for _, _, err in results)


def wait_for_step(workdir, step: int, processes: list[subprocess.Popen]) -> None:
    """Waits until the run has logged `step`; fails if a process ends before."""
    deadline = time.monotonic() + 1200
    path = workdir / 'metrics.jsonl'
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            pytest.fail(f'never came to step {step}: {[process.communicate() for process in processes]}')
        time.sleep(0.02)
