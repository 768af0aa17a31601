"""Another process of the run has died: this one says so in one line, with what is safe, and ends.

It shows in two ways. A collective fails, which is an exception of no particular type; or the coordination service
misses the other's heartbeats, and JAX's runtime aborts this process from a thread of its own.
"""

import contextlib
import ctypes
import os
import re
import signal
from collections.abc import Callable, Iterator

import jax

from gau.errors import RunFailed, UserError, chain

# As Gloo, NCCL, gRPC and the coordination service put it.
_SIGNS = re.compile(
    r'gloo|nccl|connection (reset|closed|refused)|socket closed|coordination ?service|heartbeat|barrier|unavailable:',
    re.IGNORECASE,
)
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
# What is safe and what to do, from the outermost caller to the innermost.
_advice: list[Callable[[], str]] = []


class LostProcess(RunFailed):
    """Another process of the run has died or cannot be reached."""


def is_lost(error: BaseException) -> bool:
    """Returns whether an exception says, in the words of a library, that another process is gone."""
    if jax.process_count() == 1:
        return False
    return any(
        isinstance(cause, RuntimeError | ValueError | OSError) and _SIGNS.search(str(cause)) for cause in chain(error)
    )


@contextlib.contextmanager
def told(advice: str | Callable[[], str]) -> Iterator[None]:
    """Says, if another process dies inside, what is safe and what to do.

    Raises:
      LostProcess: in place of whatever a collective raised because of it.
    """
    _advice.append(advice if callable(advice) else lambda: advice)
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        if not is_lost(error):
            raise
        reason = next(str(cause) for cause in chain(error) if _SIGNS.search(str(cause)))
        raise LostProcess(_line(f'has died or cannot be reached ({reason.strip().splitlines()[0][:200]})')) from error
    finally:
        _advice.pop()


@contextlib.contextmanager
def one_line_at_abort() -> Iterator[None]:
    """Has the abort of JAX's runtime end this process with one line and exit code 1, not with the stacks of threads."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = _Handler(_end)
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)


def _end(signum: int) -> None:
    # Called in whatever thread has aborted, which would go on aborting.
    line = _line("has died or cannot be reached, or never came (JAX's runtime has ended this one, too)")
    os.write(2, f'error: {line}\n'.encode())
    os._exit(1)


def _line(what: str) -> str:
    advice = _advice[-1]() if _advice else 'start all processes again'
    return f'another process of this run {what}; {advice}'
