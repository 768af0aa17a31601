"""Signals that come while a process is starting others."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from multiprocessing import spawn
from typing import Any

# A worker's first words. Its parent was killed before it had said what to do: there is nobody to tell, and no work.
_ALONE = 'import sys; sys.excepthook = lambda kind, *how: kind is EOFError or sys.__excepthook__(kind, *how); '


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """For a context in which `multiprocessing` spawns workers, on any thread: no signal has one print a traceback.

    SIGINT and SIGTERM are held back until the context ends, and raised then. A worker does not get SIGINT either, until
    it unblocks it. In another thread than the main one, which Python never interrupts, only that holds. SIGKILL cannot
    be held back: a worker whose parent it has met ends without a word.
    """
    met, main = [], threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    handlers = {number: signal.signal(number, lambda number, _: met.append(number)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # There is no other place for words that come before what the parent sends.
    command = spawn.get_command_line
    spawn.get_command_line = lambda **how: _with_first_words(command(**how))
    try:
        yield
    finally:
        spawn.get_command_line = command
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(met):
        signal.raise_signal(number)


def _with_first_words(command: list[Any]) -> list[Any]:
    place = command.index('-c') + 1
    return [*command[:place], _ALONE + command[place], *command[place + 1 :]]
