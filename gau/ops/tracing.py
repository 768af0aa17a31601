"""How an op is traced, and how it chooses among its implementations."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator for an op that layers call alike: the first call is traced, later ones take its trace.

    Without it a model of 24 layers is traced, and its program written down, 24 times. The compiler sees no difference.
    Constants of modules are a part of the trace: who changes one (a test) calls the op's `clear_cache()`.

    Args:
      static: the keyword arguments that are no arrays.
    """
    return functools.partial(jax.jit, static_argnames=static)


def choose(name: str, options: dict[str, Any]) -> Any:
    """Returns options[name].

    Raises:
      ValueError: there is none of this name.
    """
    if name not in options:
        raise ValueError(f'{name!r} does not exist; choose from {", ".join(options)}')
    return options[name]
