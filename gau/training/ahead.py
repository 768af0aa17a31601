"""Batches loaded ahead of the steps, so that a process that cannot load its part can say so to the others in time.

A step needs all processes, so that one without a batch cannot simply stop: the others would wait for it, unsaved. What
a process says when they are polled after step k all know after step k + 1 (`interruption.py`). With the batches up to
k + 2 loaded by then, step k + 1 is the last that has all of its batch, and there all of them save and leave.
"""

from collections import deque
from typing import Any

from gau.errors import UserError
from gau.objectives.objective import Batch, TrainBatches

AHEAD = 2


class Ahead:
    """Another iterator's batches, of which some are loaded before they are asked for; its state is not ahead.

    Attributes:
      error: why there are no batches after those that are loaded, if so.
    """

    def __init__(self, batches: TrainBatches):
        """Takes an iterator that stands where the run does; nobody else may move it from now on."""
        self.rows, self.rows_read, self.batch_size = batches.rows, batches.rows_read, batches.batch_size
        self.error: UserError | None = None
        self._batches, self._state = batches, batches.get_state()
        self._loaded: deque[tuple[Batch, dict[str, Any]]] = deque()

    def load(self, most: int) -> bool:
        """Loads batches until AHEAD of them are there, or `most`; returns whether they are."""
        wanted = min(AHEAD, most)
        while len(self._loaded) < wanted and self.error is None:
            try:
                batch = next(self._batches)
            except UserError as error:
                self.error = error
            else:
                self._loaded.append((batch, self._batches.get_state()))
        return len(self._loaded) >= wanted

    @property
    def loaded(self) -> int:
        """How many batches have been loaded and not been asked for."""
        return len(self._loaded)

    def __next__(self) -> Batch:
        """Returns the next batch, which must have been loaded."""
        batch, self._state = self._loaded.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the state after the last batch handed out."""
        return self._state

    def close(self) -> None:
        """Lets go of threads and files."""
        self._batches.close()
