"""TPU chips that a program can be compiled for without having one, and what they can do."""

import os
import re
from typing import NamedTuple

import jax

from gau.errors import UserError, did_you_mean
from gau.training.throughput import peak_flops


class Chip(NamedTuple):
    """One TPU chip, which is one JAX device here.

    Attributes:
      dimensions: of the network: AxB or AxBxC.
      config: how libtpu calls the chip's mode in which both of its cores are one device, where it has two.
      hbm_bytes: memory that a program may use, as libtpu's compiler states it when a program is too large; the chips
        have 32, 16, 95 and 32 GB.
      hbm_bandwidth: bytes/s. Google Cloud TPU documentation, as are the links.
      link_bandwidth: bytes/s that all links of a chip to its neighbours send together, in one direction.
      clock: cycles/s. v4: Jouppi et al. 2023, arXiv 2304.01433; the others: the peak of the data sheet divided by
        twice the multipliers of a chip (4 and 8 arrays of 128 x 128 in v5e and v5p, 4 of 256 x 256 in v6e).
    """

    dimensions: int
    config: str
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float


GIB = 2**30
CHIPS = {
    'v4': Chip(3, 'megacore', int(30.75 * GIB), 1228e9, 300e9, 1.05e9),
    'v5e': Chip(2, 'default', int(15.75 * GIB), 819e9, 200e9, 1.5e9),
    'v5p': Chip(3, 'megacore', int(95.74 * GIB), 2765e9, 600e9, 1.75e9),
    'v6e': Chip(2, 'default', int(31.25 * GIB), 1640e9, 400e9, 1.75e9),
}


class Target(NamedTuple):
    """The devices that a program is compiled for.

    Attributes:
      name: as it was asked for.
      devices: one a chip.
      chip: what is known of a TPU chip; None for local devices.
      memory_bytes: of one device; None where it is not known, as on a CPU.
      peak_flops: of one device in bfloat16; None where it is not known.
    """

    name: str
    devices: list[jax.Device]
    chip: Chip | None
    memory_bytes: int | None
    peak_flops: float | None


def target(name: str) -> Target:
    """Returns the devices of `v4:4x4x4` (v5e, v5p, v6e likewise), `cpu:8` (simulated here) or `local` (what is here).

    Must be called before anything else asks JAX for its devices.

    Raises:
      UserError: the name is none of these, there is no such topology, or libtpu is missing.
    """
    if name == 'local':
        return _local(name)
    kind, colon, shape = name.partition(':')
    if not colon or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){0,2}', shape) or (kind == 'cpu' and 'x' in shape):
        raise UserError(f'--topology={name}: want CHIP:AxB or CHIP:AxBxC such as v4:4x4x4, or cpu:8, or local')
    if kind == 'cpu':
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', int(shape))
        return _local(name)
    if kind not in CHIPS:
        raise UserError(f'--topology={name}: unknown chip "{kind}"{did_you_mean(kind, CHIPS)}')
    sizes = [int(n) for n in shape.split('x')]
    if len(sizes) != CHIPS[kind].dimensions:
        wanted = 'x'.join('ABC'[: CHIPS[kind].dimensions])
        raise UserError(f'--topology={name}: the chips of {kind} are numbered in {wanted}')
    return _tpu(name, CHIPS[kind], sizes)


def _local(name: str) -> Target:
    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get('bytes_limit')
    return Target(name, devices, None, limit, peak_flops(devices[0]))


def _tpu(name: str, chip: Chip, sizes: list[int]) -> Target:
    from jax.experimental import topologies

    # Nothing is computed on an accelerator, so none is waited for.
    jax.config.update('jax_platforms', 'cpu')
    # Else libtpu asks Google's metadata server which machine this is, and complains that there is none.
    for variable, value in (('SKIP_MDS_QUERY', '1'), ('WORKER_HOSTNAMES', 'localhost'), ('STDERR_LOG_LEVEL', '3')):
        os.environ.setdefault(f'TPU_{variable}', value)
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v4-8')
    # No chip is opened, so that several processes may compile at once.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    # A host has 2 x 2 chips, or is asked for with one.
    one = {'chips_per_host_bounds': (1, 1, 1)} if set(sizes) == {1} else {}
    try:
        topology = topologies.get_topology_desc(platform='tpu', topology_name=name, chip_config_name=chip.config, **one)
    except RuntimeError as error:
        if 'not installed' in str(error):
            raise UserError(
                f'--topology={name} needs the TPU compiler: pip install libtpu, in the version that '
                f'"jax[tpu]=={jax.__version__}" asks for (no TPU is needed)'
            ) from error
        raise UserError(f'--topology={name}: {str(error).splitlines()[0].partition(": ")[2] or error}') from error
    return Target(name, list(topology.devices), chip, chip.hbm_bytes, peak_flops(topology.devices[0]))
