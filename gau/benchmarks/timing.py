"""The clock of all measurements."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

WARMUP = 3
# At least so many samples, and more while they take less than so many seconds.
SAMPLES = {'full': (12, 60), 'quick': (10, 10)}
SECONDS = 4.0
# Of steps that take seconds each, such as those of a million tokens, so many must do once so long has passed.
FEWEST, LONG_SECONDS = 3, 24.0


class Times(NamedTuple):
    """Samples of one process.

    Attributes:
      seconds: from the end of one step to the end of the next.
      launch_seconds: for which the host was busy with each of these steps, before it waited.
    """

    seconds: list[float]
    launch_seconds: list[float]


def time_steps(launch: Callable[[], Any], wait: Callable[[Any], None], *, effort: str) -> Times:
    """Times steps as the training loop runs them: one is always in flight while the next is given to the device.

    Args:
      launch: starts a step and returns something to wait for.
      wait: returns when that step is done.
      effort: key of SAMPLES.
    """
    least, most = SAMPLES[effort]
    seconds, launch_seconds = [], []
    in_flight = launch()
    for _ in range(WARMUP - 1):
        in_flight, before = launch(), in_flight
        wait(before)
    started = ended = time.perf_counter()
    while len(seconds) < least or (len(seconds) < most and ended - started < SECONDS):
        if len(seconds) >= FEWEST and ended - started > LONG_SECONDS:
            break
        launched = time.perf_counter()
        in_flight, before = launch(), in_flight
        launch_seconds.append(time.perf_counter() - launched)
        wait(before)
        previous, ended = ended, time.perf_counter()
        seconds.append(ended - previous)
    wait(in_flight)
    return Times(seconds, launch_seconds)
