"""Runs the points of a sweep on a Ray cluster, each a Ray task: placement and retries are Ray's.

All nodes have the repository at one path, and a file system in common that knows locks, with the data and the directory
of the sweep. A task starts train.py on its node. If the node dies, Ray gives the point to another one, which resumes
from what the first had saved; if only Ray believes that it died, the lock of the work directory keeps the second from
starting before the first has ended. Nothing else imports this module, for Ray is an extra (requirements-ray.txt).
"""

import os
import signal
import socket
import time
from collections import Counter
from typing import Any

import ray
from ray import exceptions

from gau.errors import UserError
from gau.experiments import process
from gau.experiments.devices import check_tpu_share, memory_share
from gau.experiments.directory import ROOT, SweepDirectory
from gau.experiments.runner import POLL_SECONDS, RUNNING, WAITING, Runner, Task
from gau.experiments.sweep import Point, Program

# Variables of this process that its runs have, too; others are those that the node was started with.
VARIABLES = ('GAU_', 'JAX_', 'XLA_')


class RunFailed(Exception):
    """A run ended before it was finished; Ray tries it again."""


class RayRunner(Runner):
    """Runs on the cluster that RAY_ADDRESS names, or on the one that this machine is part of."""

    def __init__(self, *arguments: Any, per_device: int, **shared: Any):
        """Takes what a `Runner` takes, and how many runs share a device; joins the cluster.

        Raises:
          UserError: there is no cluster, or TPU chips are to be shared.
        """
        super().__init__(*arguments, **shared)
        variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
        # Else Ray kills with SIGKILL what a worker that ends has started, before the kernel's SIGTERM lets it save.
        variables['RAY_kill_child_processes_on_worker_exit'] = 'false'
        paths = filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
        address = os.environ.get('RAY_ADDRESS') or 'auto'
        _check_reachable(address)
        try:
            ray.init(
                address,
                runtime_env={'env_vars': {**variables, 'PYTHONPATH': os.pathsep.join(paths)}},
                log_to_driver=False,
                logging_level='ERROR',
            )
        except ConnectionError as error:
            raise UserError(
                '--executor=ray finds no Ray cluster: start one with "ray start --head", or set RAY_ADDRESS'
            ) from error
        resources, self._environment = _resources(per_device)
        self._run_point = ray.remote(max_retries=process.ATTEMPTS - 1, retry_exceptions=[RunFailed], **resources)(
            run_point
        )
        self._per_device = per_device
        self._shared = [ray.put(value) for value in (self._program, self._directory)]
        self._before = Counter(line['point'] for line in self._directory.starts())

    def run(self) -> int:
        """See the base class; leaves the cluster at the end."""
        try:
            return super().run()
        finally:
            ray.shutdown()

    def _fill(self) -> None:
        for task in self._queue:
            if task.state == WAITING and task.handle is None:
                # What Ray has no place for yet waits in its queue.
                task.handle = self._run_point.options(name=task.name).remote(
                    *(*self._shared, task.point),
                    cwd=os.getcwd(),
                    environment=self._environment,
                    per_device=self._per_device,
                    commit=self._commit,
                    train=process.TRAIN,
                )

    def _settle(self) -> None:
        self._tell_starts()
        running = {task.handle: task for task in self._running()}
        done, _ = ray.wait(list(running), num_returns=len(running), timeout=0) if running else ([], [])
        for reference in done:
            task = running[reference]
            if self._signals == 1 and self._directory.is_held(task.name):
                continue  # it is still saving
            task.handle = None
            try:
                error = ray.get(reference)
            except exceptions.RayError as failure:
                error = _describe(failure)
            if self._look(task).finished:
                self._finish(task)
            elif self._directory.diverged(task.name) is not None:
                self._diverge(task)
            elif self._signum:
                # What Ray had not started is not stopped.
                if task.attempts:
                    self._interrupted(task)
            else:
                self._fail(task, error, again=False)

    def _tell_starts(self) -> None:
        tasks = {task.name: task for task in self._running()}
        attempts: Counter = Counter()
        for line in self._directory.starts():
            attempts[line['point']] += 1
            task = tasks.get(line['point'])
            if task is not None and attempts[task.name] > self._before[task.name] + task.attempts:
                task.state, task.attempts, task.place = RUNNING, task.attempts + 1, line['place']
                self._started(task)

    def _stop(self, task: Task, *, kill: bool) -> None:
        ray.cancel(task.handle, force=kill)


def run_point(program: Program, directory: SweepDirectory, point: Point, *, cwd: str, **how: Any) -> str:
    """Runs a point on the node that Ray chose; returns why it is not to be tried again, or ''.

    Args:
      program: that the point is of.
      directory: claimed.
      point: an accepted one.
      cwd: directory that paths in the config are relative to.
      **how: the other arguments of `process.start`.

    Raises:
      RunFailed: it ended before it was finished, for another reason.
    """
    os.chdir(cwd)
    # ray.cancel comes as SIGINT. It must not interrupt just when a run is being started, which nobody would stop then;
    # and a node that a script has started in the background ignores it.
    cancelled: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: cancelled.append(number))
    try:
        while True:
            while directory.is_held(point.name) and not cancelled:
                # By a run whose node only seems dead, or that is still saving.
                time.sleep(POLL_SECONDS)
            if directory.progress(point.name).finished:
                return ''
            if cancelled:
                raise KeyboardInterrupt
            run = process.start(program, point, directory, place=_place(), **how)
            # No run.wait(): the signal ends no system call.
            while (code := run.poll()) is None and not cancelled:
                time.sleep(POLL_SECONDS)
            if code is None:
                run.terminate()
                run.wait()
                raise KeyboardInterrupt
            directory.note(point.name, event='end', exit_code=code)
            if code == process.BAD_INPUT and directory.is_held(point.name):
                continue  # somebody else was faster
            if code == 0 and directory.progress(point.name).finished:
                return ''
            error = process.failure(code, directory.last_line(point.name))
            if code == process.BAD_INPUT or directory.diverged(point.name) is not None:
                return error
            raise RunFailed(error)
    finally:
        signal.signal(signal.SIGINT, previous)


def _place() -> str:
    node = f'{ray.util.get_node_ip_address()} (node {ray.get_runtime_context().get_node_id()[:6]})'
    gpus = ray.get_gpu_ids()
    return f'gpu {gpus[0]} of {node}' if gpus else node


def _resources(per_device: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns what a run asks Ray for, and its environment."""
    nodes = [node['Resources'] for node in ray.nodes() if node['Alive']]
    if any('GPU' in node for node in nodes):
        # Rounded down: Ray counts ten-thousandths.
        return {'num_gpus': 10_000 // per_device / 10_000, 'num_cpus': 0}, memory_share(per_device)
    if any('TPU' in node for node in nodes):
        check_tpu_share(per_device)
        return {'resources': {'TPU': 1}, 'num_cpus': 0}, {}
    return {'num_cpus': max(1, int(min(node['CPU'] for node in nodes if 'CPU' in node)) // per_device)}, {}


def _describe(failure: exceptions.RayError) -> str:
    """Returns in a line what a run or its node died of."""
    text = str(failure.cause if isinstance(failure, exceptions.RayTaskError) else failure)
    return next(iter(text.strip().splitlines()), type(failure).__name__)


def _check_reachable(address: str) -> None:
    """Refuses an address where nobody listens at once; Ray itself tries for minutes before it says so."""
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit() or '/' in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f'--executor=ray: no Ray cluster answers at RAY_ADDRESS={address} ({error})') from error
