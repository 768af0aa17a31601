"""Ctrl-C that comes at a bad moment."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds SIGINT back until the context ends; it is raised then.

    A process that is started within does not get it either, until it unblocks it. In another thread than the main one,
    which Python never interrupts, only that holds.
    """
    met, main = [], threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda *_: met.append(True)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
    if met:
        signal.raise_signal(signal.SIGINT)
