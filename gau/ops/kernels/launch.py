"""Calls Triton kernels on JAX arrays: on an NVIDIA GPU through jax-triton, on a CPU through Triton's interpreter.

The interpreter is chosen by the environment variable TRITON_INTERPRET=1, set before Triton is imported; it is there so
that the tests prove the very kernels without a GPU.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array

from gau.ops.kernels import compat
from gau.ops.kernels.interpreter import interpret

# Programs that CUDA takes along the second and the third axis of a grid.
LARGEST_SIDE = 65_535


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


def available() -> bool:
    """Whether the packages are installed that kernels need here."""
    return importlib.util.find_spec('triton' if interpreted() else 'jax_triton') is not None


def streaming_multiprocessors() -> int:
    """Returns how many SMs the GPU has that JAX computes on by default; 0 where there is none, or none that says so."""
    return getattr(jax.devices()[0], 'core_count', 0)


def launch(
    kernel: Any,
    *inputs: Array,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    overwrite: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[Array]:
    """Runs kernel(*inputs, *outputs, **constants) and returns the outputs, a list.

    Args:
      kernel: a function under `triton.jit` whose pointers come first and whose constants are all `constexpr`.
      inputs: arrays, contiguous as JAX's are.
      outputs: shapes and types of what the kernel writes; what it leaves out is what `overwrite` left there, or
        undefined.
      grid: programs along each axis, at most three.
      num_warps: warps of a program.
      num_stages: depth of the software pipeline of its loops.
      overwrite: maps an input to the output that takes over its buffer and contents. The kernel finds them at the
        output's pointer, and makes no use of the input's.
      constants: compile-time constants, arguments of the kernel by name.

    Raises:
      ValueError: more programs than a GPU takes along an axis other than the first, or a constant that the kernel does
        not have.
    """
    unknown = sorted(set(constants).difference(kernel.arg_names))
    if unknown:
        raise ValueError(f'{kernel.__name__} has no {", ".join(unknown)}')
    if max(grid[1:], default=0) > LARGEST_SIDE:
        raise ValueError(
            f'{kernel.__name__} would have a grid of {grid}, a GPU takes {LARGEST_SIDE:,} along the second and third '
            'axis: fewer or larger chunks are needed on each device, or another model.impl'
        )
    fields = {'grid': grid, 'overwrite': overwrite or {}, 'constants': constants}
    if interpreted():
        return interpret(kernel, inputs, outputs, **fields)
    return compat.triton_call(kernel, inputs, outputs, num_warps=num_warps, num_stages=num_stages, **fields)
