"""The pipeline: documents -> tokens -> packed rows -> batches, as Grain iterators that resume exactly.

    order -> shuffle -> a stream's share -> repeat -> read, tokenize -> pack -> mix -> shuffle rows -> batch -> prefetch

A batch takes its rows from `data.streams` such streams, and a process reads those that its own rows come from, so that
nothing depends on the number of processes. Everything before `pack` is addressed by index, so the state of a stream is
a few numbers whatever the corpus: where the reader stands, where in its document the packer stands, and how many rows
of the window are already out.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import counting, examples, formats, packing, sources
from gau.data.counting import places_per_epoch
from gau.data.documents import Document, Documents
from gau.data.formats import RowFormat
from gau.data.streams import Streams, streams_of
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

Batch = dict[str, np.ndarray]

# As good as endless. Grain's own endless repeat has length 2**63 - 1, which its batching rounds up to one too many.
_EPOCHS = 2**20

# Short documents go through in groups of about so many tokens, because every element costs Grain some 0.1 ms.
_GROUP_TOKENS = 2**14
_LARGEST_GROUP = 256
# Groups read ahead by each thread: enough to hide a read, few enough for documents the size of books.
_READ_AHEAD = 8


def train_iterator(
    config: ConfigDict,
    *,
    objective: str | RowFormat,
    tokenizer: Tokenizer,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Streams:
    """Returns the endless stream of training batches, or of the given rows of them.

    Epochs follow each other without a seam: what is left of one goes on in the next, in another order, and is never
    padded or dropped. The streams (`config.streams`) hold disjoint documents; rows k * batch_size / streams and
    following are those of stream k.

    Args:
      config: the resolved data config.
      objective: how documents become rows: a name of `gau.data.formats`, or a RowFormat.
      tokenizer: from `tokenizers.load(config.tokenizer)`.
      seed: of the order and of the masks.
      rows: which rows of every batch to return, ascending; None means all.

    Returns:
      An iterator of dicts, b = the number of rows, N = context: `inputs`, `targets` int32 [b, N]; `weights`
      float32 [b, N]; and, unless attention crosses documents and there is no padding, `segment_ids` int32 [b, N] (0 is
      padding, documents count from 1 in each row) and `positions` int32 [b, N] (within the document's part in the row).
      `get_state()` is small and JSON-able; `set_state` on a fresh iterator continues bitwise.

    Raises:
      UserError: see `sources.open_split`; less text than one batch, or fewer documents than streams.
    """
    opened = sources.open_split(config, 'train')
    for name, documents in zip(data_config.sources(config), opened, strict=True):
        if len(documents) < config.streams:
            raise UserError(f'data.source="{name}" has {len(documents)} documents for data.streams={config.streams}')
        counting.check_fills_a_batch(name, documents, tokenizer, config)
    rows = range(config.batch_size) if rows is None else rows
    numbers = streams_of(rows, batch_size=config.batch_size, streams=config.streams)
    # The threads are those of the process, however many streams it reads.
    config = config.copy_and_resolve_references()
    config.read_threads = math.ceil(config.read_threads / len(numbers))
    row_format = formats.get(objective)
    opens = functools.partial(_stream, config, opened, row_format=row_format, tokenizer=tokenizer, seed=seed)
    return Streams(
        {number: opens(number=number) for number in numbers},
        rows=rows,
        batch_size=config.batch_size,
        streams=config.streams,
    )


def _stream(
    config: ConfigDict, opened: list[Documents], *, row_format: RowFormat, tokenizer: Tokenizer, seed: int, number: int
) -> grain.DatasetIterator:
    """Returns the endless batches of one stream, batch_size / streams rows each."""
    stream_rows = config.batch_size // config.streams
    rows = []
    for source, documents in enumerate(opened):
        order = grain.MapDataset.range(len(documents))
        if config.shuffle != 'none':
            order = order.shuffle(seed=_seed(seed, 'documents', source))
        order = order[number :: config.streams].repeat(_EPOCHS)
        masks = _seed(seed, 'masks', source, number)
        dataset = _columns(order, documents, config, row_format, tokenizer, seed=masks, sizes=False)
        bins_seed = None if config.shuffle == 'none' else _seed(seed, 'bins', source, number)
        rows.append(packing.pack(_read(dataset, config), config, seed=bins_seed, bins=stream_rows))
    dataset = rows[0]
    if len(rows) > 1:
        dataset = grain.IterDataset.mix(rows, [weight for weight, _ in data_config.mixture(config)])
    if config.shuffle == 'rows':
        # A window beyond an epoch would only mix epochs, and keep a small corpus waiting for its first batch.
        epoch = sum(counting.estimated_tokens(documents, tokenizer) for documents in opened)
        window = max(1, min(config.shuffle_window, epoch) // config.context // config.streams)
        dataset = grain.experimental.WindowShuffleIterDataset(
            dataset, window_size=window, seed=_seed(seed, 'rows', number)
        )
    finish = examples.finish(
        config,
        weights=row_format.weights,
        tokenizer=tokenizer,
        padded=config.packing != 'concat',
        sizes=False,
    )
    return _prefetched(dataset.batch(stream_rows).map(finish), config)


def eval_iterator(
    config: ConfigDict,
    *,
    split: str,
    context: int,
    batch_size: int,
    objective: str | RowFormat,
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Returns one pass over `split` in its own order: each token a target exactly once.

    All batches are of one shape, the last filled up with rows of weight 0. Every process makes all the rows: where one
    begins depends on all the texts before.

    Args:
      config: the resolved data config; `context` and `batch_size` replace its own.
      split: one of `sources.splits(config)`.
      context: N, tokens a row.
      batch_size: rows a batch over all processes.
      objective: as for `train_iterator`; random ones, such as masks, are drawn the same at every call.
      tokenizer: from `tokenizers.load(config.tokenizer)`.
      max_tokens: stop after about so many tokens, rounded up to whole rows (None: the whole split). Each source of a
        mixture gives rows according to its size, one at least.

    Returns:
      An iterator of dicts as from `train_iterator`. For `lm` also `target_bytes` and `target_words`, float32 [b, N]:
      each document's size spread evenly over its targets, whole numbers, so that sums over documents are exact.

    Raises:
      UserError: see `sources.open_split`.
    """
    config = config.copy_and_resolve_references()
    config.context, config.batch_size = context, batch_size
    row_format = formats.get(objective)
    sizes = row_format.spells
    static = _seed(0, 'static masks')
    opened = [documents for documents in sources.open_split(config, split) if len(documents)]
    columns = [
        _columns(
            grain.MapDataset.range(len(documents)),
            documents,
            config,
            row_format,
            tokenizer,
            seed=static,
            sizes=sizes,
        )
        for documents in opened
    ]

    def packed(part: grain.MapDataset) -> grain.IterDataset:
        return packing.pack(_read(part, config), config, seed=None, bins=batch_size)

    if max_tokens is None:
        dataset = packed(grain.MapDataset.concatenate(columns))
    else:
        rows = _shares(
            max(1, math.ceil(max_tokens / context)),
            [counting.estimated_tokens(documents, tokenizer) for documents in opened],
        )
        parts = [
            grain.experimental.LimitIterDataset(packed(part), count) for part, count in zip(columns, rows, strict=True)
        ]
        dataset = parts[0] if len(parts) == 1 else grain.experimental.InterleaveIterDataset(parts, cycle_length=1)
    finish = examples.finish(
        config,
        weights=row_format.weights,
        tokenizer=tokenizer,
        # The last row ends in padding; a causal model never sees it.
        padded=config.packing != 'concat' or not row_format.causal,
        sizes=sizes,
    )
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return _prefetched(dataset.batch(batch_size, batch_fn=pad).map(finish), config)


def _prefetched(dataset: grain.IterDataset, config: ConfigDict) -> grain.DatasetIterator:
    """Returns the batches, as many made ahead as the config says; their state may have been JSON in between."""
    if config.prefetch_batches:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=config.prefetch_batches)
    return _Resumable(iter(dataset))


def _shares(rows: int, sizes: list[int]) -> list[int]:
    """Returns `rows` shared out in proportion to `sizes`, at least one each."""
    ends = np.rint(rows * np.cumsum(sizes) / max(sum(sizes), 1)).astype(int)
    return [max(1, int(share)) for share in np.diff(ends, prepend=0)]


def _columns(
    order: grain.MapDataset,
    documents: Documents,
    config: ConfigDict,
    row_format: RowFormat,
    tokenizer: Tokenizer,
    *,
    seed: int,
    sizes: bool,
) -> grain.MapDataset:
    """Reads and tokenizes the documents whose indices `order` holds, some at a time."""
    count = len(documents)
    mean = counting.estimated_tokens(documents, tokenizer) // max(count, 1) + 1
    # Not much of an epoch at once: Grain's shuffle takes milliseconds an index where there are only a few.
    most = min(_LARGEST_GROUP, count // 16)
    groups = order.batch(max(min(_GROUP_TOKENS // mean, most), 1), batch_fn=list).map(_reader(documents))
    columns = row_format.columns(config, tokenizer, sizes)
    # Seeded by the index, which goes on counting from epoch to epoch: a document is masked anew each time it comes.
    return groups.random_map(columns, seed=seed) if row_format.draws else groups.map(columns)


def _reader(documents: Documents) -> Callable[[list[int]], list[Document]]:
    """Returns the map from indices to the documents that are not left out."""
    if hasattr(documents, '__getitems__'):
        return lambda indices: documents.__getitems__(indices)
    return lambda indices: [document for document in map(documents.__getitem__, indices) if document is not None]


def _read(dataset: grain.MapDataset, config: ConfigDict) -> grain.IterDataset:
    threads = config.read_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * _READ_AHEAD)
    return dataset.to_iter_dataset(options)


def _seed(seed: int, *purpose: str | int) -> int:
    """Returns a 31-bit seed for one purpose, so that no two shuffles share a stream (nor runs with seeds s, s + 1)."""
    words = [int.from_bytes(part.encode(), 'little') if isinstance(part, str) else part for part in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint32)[0] >> 1)


class _Resumable(grain.DatasetIterator):
    """The outermost iterator: takes its state back after JSON, which turns tuples into lists.

    Grain's concatenating packer tells "no remainder" by comparing with a tuple, so a list there would make it drop a
    document on resume.
    """

    def __init__(self, parent: grain.DatasetIterator) -> None:
        super().__init__(parent)
        # Runs at exit at the latest: a prefetching thread that outlives the interpreter's modules dies noisily.
        weakref.finalize(self, parent.close)

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """Returns the state after the last batch handed out, whatever was prefetched."""
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""
        self._parent.set_state(_tuples(state))


def _tuples(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return tuple(_tuples(value) for value in state)
    return state


__all__ = ['Batch', 'Document', 'eval_iterator', 'places_per_epoch', 'train_iterator']
