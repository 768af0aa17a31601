"""Calls Triton kernels on JAX arrays: on an NVIDIA GPU through jax-triton, on a CPU through Triton's interpreter.

The interpreter (environment variable TRITON_INTERPRET=1, set before Triton is imported) runs a kernel program by
program in NumPy: slow, and there so that the tests prove the very kernels without a GPU.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from gau.imports import without_pytorch
from gau.ops.kernels.compiled import kept

# Programs that CUDA takes along the second and the third axis of a grid.
LARGEST_SIDE = 65_535
# The custom call of a Triton kernel that jaxlib marks as fit for CUDA graphs.
GRAPH_CALL = 'triton_kernel_call_ffi'
# Versions of XLA's interface for custom calls: contents as one string, or as named attributes.
OLDER_INTERFACE, TYPED_INTERFACE = 2, 4
# It changes Triton's functions while it runs, and JAX may call back from several threads.
_INTERPRETER = threading.Lock()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


def available() -> bool:
    """Whether the packages are installed that kernels need here."""
    return importlib.util.find_spec('triton' if interpreted() else 'jax_triton') is not None


def power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n and at least 16, the smallest side of a matrix unit's tile."""
    return max(16, 1 << (n - 1).bit_length())


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
      overwrite: maps an input to the output that takes over its buffer and contents.
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
    overwrite = dict(overwrite or {})
    if interpreted():
        return _interpret(kernel, inputs, outputs, grid, overwrite, constants)
    return _jax_triton().triton_call(
        *inputs,
        kernel=kernel,
        out_shape=list(outputs),
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        input_output_aliases=overwrite,
        **constants,
    )


@functools.cache
def _jax_triton() -> Any:
    """Returns the package jax_triton; its kernels are kept, and lowered to the call that may be part of a CUDA graph.

    The package (0.3) names jaxlib's older call, for which XLA ends a graph and the host launches kernel by kernel. The
    newer one has the same contents, as an attribute.
    """
    import jax_triton
    import triton
    from jax.interpreters import mlir
    from jax_triton import triton_lib
    from jaxlib import gpu_triton
    from triton._C import libtriton

    triton_lib.compile_ttir_to_ptx_inplace = kept(
        triton_lib.compile_ttir_to_ptx_inplace,
        triton_lib.CompilationResult,
        # Triton's own key has these variables as well.
        surroundings=lambda: str(
            [triton.__version__, jax_triton.__version__, *sorted(libtriton.get_cache_invalidating_env_vars().items())]
        ),
    )
    if GRAPH_CALL not in gpu_triton._cuda_triton.registrations():
        return jax_triton

    def lowering(*args, **params):
        with without_pytorch():
            results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, *args, **params)
        fit_for_graphs(jax.tree.leaves(results)[0].owner)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowering, platform='cuda')
    return jax_triton


def fit_for_graphs(call: Any) -> None:
    """Makes of a custom call to jaxlib's older entry for Triton kernels one to `GRAPH_CALL`, in place.

    Args:
      call: an MLIR operation `stablehlo.custom_call`; any other version of the interface than the older is left alone.
    """
    from jaxlib.mlir import ir

    attributes = call.attributes
    if ir.IntegerAttr(attributes['api_version']).value == OLDER_INTERFACE:
        attributes['backend_config'] = ir.DictAttr.get({'opaque': attributes['backend_config']})
        attributes['call_target_name'] = ir.StringAttr.get(GRAPH_CALL)
        attributes['api_version'] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), TYPED_INTERFACE)


def _interpret(kernel, inputs, outputs, grid, overwrite, constants) -> list[Array]:
    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        arrays = [np.ascontiguousarray(array) for array in arrays]
        # What a kernel leaves unwritten must not look like a result.
        results = [np.full(leaf.shape, np.nan, leaf.dtype) for leaf in outputs]
        for source, target in overwrite.items():
            results[target] = arrays[source].copy()
        with _INTERPRETER:
            kernel[grid](*map(_Tensor, [*arrays, *results]), **constants)
        return results

    return list(jax.pure_callback(call, list(outputs), *inputs))


class _Tensor:
    """A NumPy array with as much of a PyTorch tensor's manners as Triton's interpreter asks for."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> '_Tensor':
        return self

    cpu = untyped_storage

    def new_empty(self, *_: Any, **__: Any) -> '_Tensor':
        return _Tensor(self.array)

    def set_(self, *_: Any) -> None:
        """Host and device are one here: there is nothing to move, either way."""

    copy_ = set_
    storage_offset = size = stride = set_
