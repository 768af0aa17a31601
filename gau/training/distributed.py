"""Several processes that train one model: how they start and end together, and how they agree.

One process a host (or a GPU), each with its own devices, all running the same program; `jax.distributed` joins them.
What only one may do (write files) the first does; what one refuses, all refuse. Where there is one process, everything
here is free of cost and of collectives.
"""

import contextlib
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gau.errors import RunFailed, UserError
from gau.training import lost_process

# Seconds in which every process must have come, and must have left at the end.
_START_SECONDS = 300
_END_SECONDS = 60


@contextlib.contextmanager
def processes(
    *,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    detect: bool,
    heartbeat_seconds: int,
) -> Iterator[None]:
    """Joins the processes of a run for as long as the context lasts; does nothing for a single one.

    Must be entered before JAX has looked for devices. A process that fails inside with anything but a UserError ends
    here and at once, with exit code 1 and a traceback (or one line for a RunFailed, and where another process is gone,
    see lost_process.py), because an orderly end would wait for the others.

    Args:
      coordinator_address: HOST:PORT of process 0, where the processes meet.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      detect: whether to ask the environment, without the three above: Slurm, Open MPI, Kubernetes, Cloud TPU.
      heartbeat_seconds: a process that has been silent for so long is taken for dead, and the others end.

    Raises:
      UserError: the arguments do not fit together, or the processes did not find each other.
    """
    given = {'coordinator_address': coordinator_address, 'num_processes': num_processes, 'process_id': process_id}
    _check(given, detect=detect, heartbeat_seconds=heartbeat_seconds)
    if num_processes is not None:
        several, arguments = num_processes > 1, {**given, 'cluster_detection_method': 'deactivate'}
    else:
        several, arguments = detect and _in_a_cluster(), {}
    if not several:
        yield
        return
    with lost_process.one_line_at_abort():
        if not _join(heartbeat_seconds, **arguments):
            yield
            return
        try:
            with lost_process.told('start all processes again'):
                yield
                jax.distributed.shutdown()
        except UserError:
            jax.distributed.shutdown()
            raise
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            if interrupted:
                print('interrupted', file=sys.stderr)
            elif isinstance(error, RunFailed):
                print(f'error: {error}', file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130 if interrupted else 1)


def _check(given: dict[str, str | int | None], *, detect: bool, heartbeat_seconds: int) -> None:
    missing = [f'--{name}' for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f'--coordinator_address, --num_processes and --process_id go together: give {missing[0]}, too')
    if heartbeat_seconds < 1:
        raise UserError(f'--heartbeat_seconds={heartbeat_seconds} must be at least 1')
    if missing:
        return
    if not detect:
        raise UserError('--distributed=off means one process alone: it does not go with --num_processes')
    address, count, index = given.values()
    if not 0 <= index < count:
        raise UserError(f'--process_id={index} must lie in 0..{count - 1} for --num_processes={count}')
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal():
        raise UserError(f'--coordinator_address={address} must be HOST:PORT of the process with --process_id=0')


def _in_a_cluster() -> bool:
    """Returns whether the environment speaks of several processes; a single one must not pay for asking further."""
    environment = os.environ

    def several(variable: str) -> bool:
        return environment.get(variable, '').isdecimal() and int(environment[variable]) > 1

    # In a shell inside a Slurm allocation there are tasks, too, but no step that this process belongs to.
    slurm = 'SLURM_STEP_NODELIST' in environment and several('SLURM_NTASKS')
    kubernetes = 'KUBERNETES_SERVICE_HOST' in environment and 'JOB_COMPLETION_INDEX' in environment
    tpu_hosts = environment.get('TPU_PROCESS_ADDRESSES', environment.get('TPU_WORKER_HOSTNAMES', ''))
    tpu = ',' in tpu_hosts or (
        any(Path(device).exists() for device in ('/dev/accel0', '/dev/vfio/0'))
        and importlib.util.find_spec('libtpu') is not None
    )
    return slurm or several('OMPI_COMM_WORLD_SIZE') or kubernetes or tpu


def _join(heartbeat_seconds: int, **arguments: str | int | None) -> bool:
    """Starts jax.distributed; returns whether there is more than this process."""
    # The preemption service would take SIGTERM for itself, from the start on; see interruption.py for what we do.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except Exception as error:  # JAX, its clusters' clients and gRPC promise no type.
        where = f'at {arguments["coordinator_address"]}' if arguments else 'in the cluster that the environment names'
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f'the processes could not be joined {where} ({reason}); '
            '--coordinator_address, --num_processes and --process_id name them, --distributed=off runs this one alone'
        ) from error
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes the files."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Returns the texts that all processes passed, by process; each must call it, and waits for the others."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(data.size)).ravel()
    # Few sizes, because each is a program to compile.
    room = 1 << max(int(lengths.max()), 1 << 10).bit_length()
    padded = multihost_utils.process_allgather(np.pad(data, (0, room - data.size)))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]


def of_first(text: str) -> str:
    """Returns the text that the first process passed; all must call it."""
    return gather(text)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a part of the set-up that every process does for itself.

    Raises:
      UserError: in every process, what one of them raised, so that none goes on and waits for it.
    """
    refusal = None
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        refusal = error
    if jax.process_count() == 1:
        return
    refusals = gather(str(refusal) if refusal else '')
    culprits = [index for index, text in enumerate(refusals) if text]
    if len(culprits) == len(refusals):
        raise UserError(refusals[0]) from refusal
    if culprits:
        raise UserError(f'process {culprits[0]} of {len(refusals)}: {refusals[culprits[0]]}') from refusal


def check_same(what: str, text: str) -> None:
    """Raises UserError, in every process, unless all pass the same text."""
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    others = [index for index, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f'{what}: process {others[0]} of {len(digests)} has another than process 0')
