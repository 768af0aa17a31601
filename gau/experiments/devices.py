"""The places where runs can go: devices of this machine, or shares of them, as environments of a process."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from gau.errors import UserError

# Of a GPU's memory, what the runs on it take together; the rest is for CUDA itself.
MEMORY_FRACTION = 0.92
_FRACTION = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
DEVICE_FILES = Path('/dev')


class Place(NamedTuple):
    """Where one run at a time can go.

    Attributes:
      name: as people call it.
      environment: what a process there needs besides this one's environment.
    """

    name: str
    environment: dict[str, str]


def find_places(per_device: int) -> list[Place]:
    """Returns `per_device` places on each GPU or TPU chip of this machine, or on its CPU if it has neither.

    `CUDA_VISIBLE_DEVICES` and `JAX_PLATFORMS` are heeded.

    Raises:
      UserError: TPU chips are not shared.
    """
    gpus = [] if os.environ.get('JAX_PLATFORMS') in ('cpu', 'tpu') else _gpus()
    if gpus:
        share = memory_share(per_device)
        places = [Place(f'gpu {gpu}', {'CUDA_VISIBLE_DEVICES': gpu, **share}) for gpu in gpus]
        # One run on each device first, then a second one.
        return places * per_device
    chips = [] if os.environ.get('JAX_PLATFORMS') == 'cpu' else sorted(DEVICE_FILES.glob('accel[0-9]*'))
    if not chips and os.environ.get('JAX_PLATFORMS') == 'tpu':
        # From v5e on. Other devices may lie there as well, so TPUs must be asked for.
        chips = sorted(DEVICE_FILES.glob('vfio/[0-9]*'))
    if chips:
        check_tpu_share(per_device)
        alone = {'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1', 'TPU_PROCESS_BOUNDS': '1,1,1'}
        return [Place(f'tpu {number}', {'TPU_VISIBLE_CHIPS': str(number), **alone}) for number in range(len(chips))]
    return [Place('cpu', {})] * per_device


def memory_share(per_device: int) -> dict[str, str]:
    """Returns the environment of a run that shares a GPU's memory with others, `per_device` in all."""
    share = float(os.environ.get(_FRACTION, MEMORY_FRACTION)) / per_device
    return {_FRACTION: f'{share:.3f}'}


def check_tpu_share(per_device: int) -> None:
    """Raises UserError if runs are to share a TPU chip."""
    if per_device > 1:
        raise UserError(f'--per_device={per_device}: a TPU chip serves one run at a time')


def _gpus() -> list[str]:
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(',') if gpu.strip() not in ('', '-1')]
    try:
        listed = subprocess.run(
            ['nvidia-smi', '--query-gpu=index', '--format=csv,noheader'], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.stdout.split()
