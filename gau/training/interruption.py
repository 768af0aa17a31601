"""SIGTERM and SIGINT: the run finishes its step, saves and ends, on all processes at the same step.

So it does where one of several processes cannot load its part of a batch (`ahead.py`).

How the processes agree: after every step each contributes the signal it has got, or 0, to a maximum over all devices,
a program of its own that runs behind the step; it is read one step later, when it has long been done, so that neither
the host nor the devices wait. `multihost_utils.reached_preemption_sync_point` would agree as well, but it takes SIGTERM
for itself from the moment that the processes join, knows no SIGINT, and does not say which signal came.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# In place of a signal's number, and above all of them: a process has no batch for the step after the next.
NO_BATCH = 1000


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state has been saved. `exit_code` is what the shell expects of it."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class Interruption:
    """Catches the two signals while its context lasts; a second SIGINT interrupts at once.

    Python gives signals to the main thread only: a run in another thread leaves them to whoever started it.
    """

    def __init__(self, mesh: Mesh):
        """Takes the mesh over the devices of all processes."""
        self.signum = 0
        self._received = 0
        self._no_batch = False
        self._previous: dict[int, Any] = {}
        self._alone = jax.process_count() == 1
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def __enter__(self) -> 'Interruption':
        main = threading.current_thread() is threading.main_thread()
        for signum in (signal.SIGTERM, signal.SIGINT) if main else ():
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def __bool__(self) -> bool:
        """Whether the run must end: with one process as soon as the signal came, else once `poll` has said so."""
        return self.signum != 0

    def no_batch(self) -> None:
        """Tells the other processes, when they are polled next, that this one cannot load a batch."""
        self._no_batch = True

    def poll(self) -> bool:
        """Asks all processes, and returns whether one had got a signal when they were asked the time before.

        Every process must call it at the same places of its program. With one process there is nobody to ask.
        """
        if not self._alone:
            if self._asked is not None and not self.signum:
                self.signum = int(self._asked)
            flag = np.full(1, NO_BATCH if self._no_batch else self._received, np.int32)
            flags = jax.make_array_from_callback((self._size,), self._flags, lambda _: flag)
            self._asked = self._highest(flags)
        return bool(self)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signum
        if self._alone:
            self.signum = self._received
