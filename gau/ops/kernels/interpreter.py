"""Runs Triton kernels in Triton's interpreter, program by program in NumPy: slow, to prove kernels without a GPU."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

# The interpreter changes Triton's functions while it runs, and JAX may call back from several threads.
_LOCK = threading.Lock()


def interpret(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    overwrite: Mapping[int, int],
    constants: Mapping[str, Any],
) -> list[Array]:
    """Returns what `kernel` writes; see `gau.ops.kernels.launch.launch`, which has the same arguments."""

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        arrays = [np.ascontiguousarray(array) for array in arrays]
        # What a kernel leaves unwritten must not look like a result.
        results = [np.full(leaf.shape, np.nan, leaf.dtype) for leaf in outputs]
        for source, target in overwrite.items():
            results[target] = arrays[source].copy()
            # Nor must a kernel read what was overwritten from where it was.
            arrays[source] = np.full_like(arrays[source], np.nan)
        with _LOCK:
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
