"""Runs Triton kernels in Triton's interpreter, program by program in NumPy: slow, to prove kernels without a GPU."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
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
        with _LOCK, _patched_once(), _bfloat16():
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


@contextlib.contextmanager
def _bfloat16() -> Iterator[None]:
    """Bfloat16 is multiplied, and rounded to nearest, as on a GPU.

    The interpreter keeps a bfloat16 as its bits, which it multiplies as integers, and cuts a float32 off to make one.
    """
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype.scalar != language.bfloat16:
            return x
        return TensorHandle(x.data.view(jnp.bfloat16).astype(np.float32), language.float32)

    def rounding_cast(self, x, to):
        if (x.dtype.scalar, to.scalar) != (language.float32, language.bfloat16):
            return cast(self, x, to)
        return TensorHandle(x.data.astype(jnp.bfloat16).view(np.uint16), to.scalar)

    InterpreterBuilder.create_dot = lambda self, a, b, *more: create_dot(self, widened(a), widened(b), *more)
    InterpreterBuilder.cast_impl = rounding_cast
    try:
        yield
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast


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
