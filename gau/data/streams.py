"""Batches whose rows come from several streams, so that a process reads only the streams of its own rows.

A stream is one of `data.streams` shards of the data order: every so-many-th document, shuffled, packed and batched.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from gau.errors import UserError


def streams_of(rows: Sequence[int], *, batch_size: int, streams: int) -> list[int]:
    """Returns the numbers of the streams that the rows of a batch come from, ascending."""
    return sorted({row * streams // batch_size for row in rows})


class Streams:
    """The iterator over batches: takes each stream's next rows and keeps those that were asked for.

    All streams stand at the same batch, so that any process can go on with a stream that another one has read.
    """

    def __init__(
        self,
        iterators: Mapping[int, grain.DatasetIterator],
        *,
        rows: Sequence[int],
        batch_size: int,
        streams: int,
    ):
        """Takes one iterator for each number of `streams_of(rows)`; `rows` ascend."""
        self.streams = streams
        self.batch_size = batch_size
        self.rows = tuple(rows)
        self.rows_read = len(iterators) * (batch_size // streams)
        self._iterators = dict(iterators)
        each = batch_size // streams
        self._kept = {
            number: np.array([row - number * each for row in rows if row // each == number]) for number in iterators
        }
        self._before: dict[str, Any] | None = None
        self._whole = {number: len(kept) == each for number, kept in self._kept.items()}

    def __iter__(self) -> 'Streams':
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch's rows, in the order of `rows`; if that fails, the state is that before it.

        Raises:
          UserError: a document cannot be taken, or a stream has none with any text.
        """
        parts, before = [], self.get_state()
        for number, iterator in self._iterators.items():
            try:
                batch = next(iterator)
            except Exception as error:
                self._before = before
                if isinstance(error, StopIteration):
                    # It goes round without end, but for what is left out.
                    text = f'data.streams={self.streams}: all documents of stream {number} are blank or left out'
                    raise UserError(text) from error
                raise
            kept = self._kept[number]
            parts.append(batch if self._whole[number] else {key: x[kept] for key, x in batch.items()})
        if len(parts) == 1:
            return parts[0]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the state of every stream that is read here, by its number (a string, as in JSON)."""
        if self._before is not None:
            return self._before
        return {str(number): iterator.get_state() for number, iterator in self._iterators.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `state` was taken; states of other streams are passed over."""
        self._before = None
        for number, iterator in self._iterators.items():
            iterator.set_state(state[str(number)])

    def close(self) -> None:
        """Stops the threads that read ahead."""
        for iterator in self._iterators.values():
            iterator.close()
