"""Runs Triton kernels in Triton's interpreter, program by program in NumPy: slow, to prove kernels without a GPU."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
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
        results = [_unwritten(leaf) for leaf in outputs]
        for source, target in overwrite.items():
            results[target] = arrays[source].copy()
            # Nor must a kernel read what was overwritten from where it was.
            arrays[source] = _unwritten(arrays[source])
        with _LOCK, _patched_once():
            kernel[grid](*map(_Tensor, [*arrays, *results]), **constants)
        return results

    return list(jax.pure_callback(call, list(outputs), *inputs))


def _unwritten(leaf: Any) -> np.ndarray:
    return np.full(
        leaf.shape, np.iinfo(leaf.dtype).min if np.issubdtype(leaf.dtype, np.integer) else np.nan, leaf.dtype
    )


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    """Triton's functions are changed once a launch, where Triton does it again at each call of a kernel's functions.

    What is changed are the modules `triton.language` and `.core` that a function sees. To do so a second time changes
    nothing, and would be half of all the time.
    """
    from triton import language
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_lang(function):
        seen = frozenset(x.__name__ for x in function.__globals__.values() if x is language or x is language.core)
        if seen in patched:
            return SimpleNamespace(restore=lambda: None)
        patched.add(seen)
        return patch(function)

    interpreter._patch_lang = patch_lang
    try:
        yield
    finally:
        interpreter._patch_lang = patch


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
