"""Keeps compiled Triton kernels beside XLA's compiled programs; jax-triton (0.3) compiles its own in every process."""

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

# Within JAX's compilation cache.
FOLDER = 'triton'


def kept(
    compile_kernel: Callable[..., Any], result: Callable[..., Any], *, surroundings: Callable[[], str]
) -> Callable[..., Any]:
    """Returns `compile_kernel` with a memory, in the folder `triton` of JAX's compilation cache, where that is in use.

    What cannot be read is compiled, what cannot be written is compiled again the next time. A module knows the lines of
    its source, so that a kernel that moved is compiled again.

    Args:
      compile_kernel: (module, backend, options, compute_capability) to an object whose attributes are strings, numbers
        or None.
      result: makes such an object of its attributes.
      surroundings: returns whatever else decides what is compiled.
    """

    def look_up(module: Any, backend: Any, options: Any, compute_capability: int) -> Any:
        directory = jax.config.jax_compilation_cache_dir
        # For a dump jax-triton wants what lies between, which is not kept.
        if not directory or not jax.config.jax_enable_compilation_cache or os.environ.get('JAX_TRITON_DUMP_DIR'):
            return compile_kernel(module, backend, options, compute_capability)
        key = '\n'.join([str(module), backend.hash(), options.hash(), str(compute_capability), surroundings()])
        path = epath.Path(directory) / FOLDER / f'{hashlib.sha256(key.encode()).hexdigest()}.json'
        try:
            return result(**json.loads(path.read_text()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            logging.warning('%s cannot be read, the kernel is compiled anew: %s', path, error)
        compiled = compile_kernel(module, backend, options, compute_capability)
        # Whole or not at all, whoever else writes it.
        part = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(vars(compiled)))
            part.replace(path)
        except OSError as error:
            logging.warning('%s cannot be written: %s', path, error)
            with contextlib.suppress(OSError):
                part.unlink()
        return compiled

    return look_up
