"""Keeps compiled Triton kernels beside XLA's compiled programs: jax-triton compiles its own anew in every process."""

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
# Stages of compiling that a result has for dumps only; they are larger than the rest of it.
STAGES = ('ttgir', 'llir')


def cached_on_disk(
    compile_kernel: Callable[..., Any], result: Callable[..., Any], *, surroundings: Callable[[], str]
) -> Callable[..., Any]:
    """Returns `compile_kernel` with a cache, in the folder `triton` of JAX's compilation cache, where that is in use.

    A file that cannot be read is compiled anew, one that cannot be written is compiled again the next time. A module
    holds the line numbers of its source, so that a kernel that moved within its file is compiled again.

    Args:
      compile_kernel: (module, backend, options, compute_capability) to an object whose attributes JSON can hold.
      result: makes such an object of its attributes.
      surroundings: returns whatever else decides what is compiled.
    """

    def look_up(module: Any, backend: Any, options: Any, compute_capability: int) -> Any:
        directory = jax.config.jax_compilation_cache_dir
        # A dump needs the stages.
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
        fields = {name: '' if value and name in STAGES else value for name, value in vars(compiled).items()}
        # Written aside and moved into place, so that no other process reads half a file.
        part = path.with_name(f'{path.name}.{uuid.uuid4().hex}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(fields))
            part.replace(path)
        except OSError as error:
            logging.warning('%s cannot be written: %s', path, error)
            with contextlib.suppress(OSError):
                part.unlink()
        return compiled

    return look_up
