"""The pipeline: documents -> tokens -> packed rows -> batches, as Grain iterators that resume exactly.

    order -> shuffle -> own share -> repeat -> read, tokenize -> pack -> mix -> shuffle rows -> batch -> prefetch

Everything before `pack` is addressed by index, so the state of a stream is a few numbers whatever the corpus: where the
reader stands, where in its document the packer stands, and how many rows of the window are already out.
"""

import functools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gau.data import config as data_config
from gau.data import examples, masking, sources
from gau.data.documents import Document, Documents
from gau.data.shards import Shards
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
# Rows filled together by first-fit packing at least; more rows leave less padding.
_BINS = 64


def train_iterator(
    config: ConfigDict,
    *,
    objective: str,
    tokenizer: Tokenizer,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns the endless stream of this process's training batches.

    Epochs follow each other without a seam: what is left of one goes on in the next, in another order, and is never
    padded or dropped. Processes read disjoint documents.

    Args:
      config: the resolved data config.
      objective: `lm` or `mlm`.
      tokenizer: from `tokenizers.load(config.tokenizer)`.
      seed: of the order and of the masks.
      process_index: this process, 0..process_count-1.
      process_count: processes that share the batch.

    Returns:
      An iterator of dicts, b = batch_size / process_count, N = context: `inputs`, `targets` int32 [b, N]; `weights`
      float32 [b, N]; and, unless attention crosses documents and there is no padding, `segment_ids` int32 [b, N] (0 is
      padding, documents count from 1 in each row) and `positions` int32 [b, N] (within the document's part in the row).
      `get_state()` is small and JSON-able; `set_state` on a fresh iterator continues bitwise.

    Raises:
      UserError: see `sources.open_split`; a batch that does not divide by the processes; less text than one batch.
    """
    if config.batch_size % process_count:
        raise UserError(f'data.batch_size={config.batch_size} must be a multiple of the {process_count} processes')
    opened = sources.open_split(config, 'train')
    local_batch = config.batch_size // process_count
    for name, documents in zip(data_config.sources(config), opened, strict=True):
        if len(documents) < process_count:
            raise UserError(f'data.source="{name}" has {len(documents)} documents for {process_count} processes')
        _check_fills_a_batch(name, documents, tokenizer, config)
    rows = []
    for number, documents in enumerate(opened):
        order = grain.MapDataset.range(len(documents))
        if config.shuffle != 'none':
            order = order.shuffle(seed=_seed(seed, 'documents', number))
        order = order[process_index::process_count].repeat(_EPOCHS)
        masks = _seed(seed, 'masks', number, process_index)
        dataset = _columns(order, documents, config, objective, tokenizer, seed=masks, sizes=False)
        bins_seed = None if config.shuffle == 'none' else _seed(seed, 'bins', number, process_index)
        rows.append(_pack(_read(dataset, config), config, tokenizer, seed=bins_seed, bins=local_batch))
    dataset = rows[0]
    if len(rows) > 1:
        dataset = grain.IterDataset.mix(rows, [weight for weight, _ in data_config.mixture(config)])
    if config.shuffle == 'rows':
        # A window beyond an epoch would only mix epochs, and keep a small corpus waiting for its first batch.
        epoch = sum(_estimated_tokens(documents, tokenizer) for documents in opened)
        window = max(1, min(config.shuffle_window, epoch) // config.context // process_count)
        dataset = grain.experimental.WindowShuffleIterDataset(
            dataset, window_size=window, seed=_seed(seed, 'rows', process_index)
        )
    finish = examples.finish(
        config,
        objective=objective,
        tokenizer=tokenizer,
        padded=config.packing != 'concat',
        sizes=False,
    )
    dataset = dataset.batch(local_batch).map(finish)
    if config.prefetch_batches:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=config.prefetch_batches)
    return _Resumable(iter(dataset))


def eval_iterator(
    config: ConfigDict,
    *,
    split: str,
    context: int,
    batch_size: int,
    objective: str,
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Returns one pass over `split` in its own order: each token a target exactly once.

    Every process gets the same number of batches, all of one shape, the last filled up with rows of weight 0; put
    together they are the same rows whatever the number of processes. (Each process reads the whole split for that.)

    Args:
      config: the resolved data config; `context` and `batch_size` replace its own.
      split: one of `sources.splits(config)`.
      context: N, tokens a row.
      batch_size: rows a batch over all processes.
      objective: `lm` or `mlm`; the masks of `mlm` are the same at every call.
      tokenizer: from `tokenizers.load(config.tokenizer)`.
      max_tokens: stop after about so many tokens, rounded up to whole rows (None: the whole split). Each source of a
        mixture gives rows according to its size, one at least.
      process_index: this process, 0..process_count-1.
      process_count: processes that share the batches.

    Returns:
      An iterator of dicts as from `train_iterator`. For `lm` also `target_bytes` and `target_words`, float32 [b, N]:
      each document's size spread evenly over its targets, whole numbers, so that sums over documents are exact.

    Raises:
      UserError: see `sources.open_split`; a batch that does not divide by the processes.
    """
    if batch_size % process_count:
        raise UserError(f'an evaluation batch of {batch_size} rows must be a multiple of the {process_count} processes')
    config = config.copy_and_resolve_references()
    config.context, config.batch_size = context, batch_size
    sizes = objective == 'lm'
    static = _seed(0, 'static masks')
    opened = [documents for documents in sources.open_split(config, split) if len(documents)]
    columns = [
        _columns(
            grain.MapDataset.range(len(documents)),
            documents,
            config,
            objective,
            tokenizer,
            seed=static,
            sizes=sizes,
        )
        for documents in opened
    ]

    def packed(part: grain.MapDataset) -> grain.IterDataset:
        return _pack(_read(part, config), config, tokenizer, seed=None, bins=batch_size)

    if max_tokens is None:
        dataset = packed(grain.MapDataset.concatenate(columns))
    else:
        rows = _shares(
            max(1, math.ceil(max_tokens / context)),
            [_estimated_tokens(documents, tokenizer) for documents in opened],
        )
        parts = [
            grain.experimental.LimitIterDataset(packed(part), count) for part, count in zip(columns, rows, strict=True)
        ]
        dataset = parts[0] if len(parts) == 1 else grain.experimental.InterleaveIterDataset(parts, cycle_length=1)
    finish = examples.finish(
        config,
        objective=objective,
        tokenizer=tokenizer,
        # The last row ends in padding; a causal model never sees it.
        padded=config.packing != 'concat' or objective != 'lm',
        sizes=sizes,
    )
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    own = slice(process_index * batch_size // process_count, (process_index + 1) * batch_size // process_count)
    dataset = dataset.batch(batch_size, batch_fn=pad).map(lambda batch: {k: v[own] for k, v in finish(batch).items()})
    if config.prefetch_batches:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=config.prefetch_batches)
    return _Resumable(iter(dataset))


def _shares(rows: int, sizes: list[int]) -> list[int]:
    """Returns `rows` shared out in proportion to `sizes`, at least one each."""
    ends = np.rint(rows * np.cumsum(sizes) / max(sum(sizes), 1)).astype(int)
    return [max(1, int(share)) for share in np.diff(ends, prepend=0)]


def tokens_per_epoch(config: ConfigDict, tokenizer: Tokenizer, objective: str = 'lm') -> int:
    """Returns how many tokens one pass over the training documents feeds: each document's own, and EOS (MLM: and BOS).

    Exact: from the manifest for prepared tokens, counted by one pass otherwise.
    """
    frame = {'lm': 1, 'mlm': 2}[objective]
    total = 0
    for documents in sources.open_split(config, 'train'):
        if isinstance(documents, Shards):
            total += documents.totals['tokens'] + frame * documents.totals['documents']
        else:
            total += _count_tokens(documents, tokenizer, frame)
    return total


def _count_tokens(documents: Documents, tokenizer: Tokenizer, frame: int) -> int:
    """Tokenizes everything once, on all cores as far as the tokenizer's library releases the interpreter."""
    count = len(documents)
    # A part is some milliseconds of work, so that threads share the work evenly and the bar moves.
    parts = [range(start, min(start + 32, count)) for start in range(0, count, 32)]

    def tokens_in(part: range) -> int:
        return sum(length + frame for length in _lengths(documents, tokenizer, part))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # Silent unless it takes a while.
        bar = tqdm(total=count, desc='counting tokens', unit=' documents', delay=2, leave=False)
        with bar:
            total = 0
            for part, tokens in zip(parts, pool.map(tokens_in, parts), strict=True):
                total += tokens
                bar.update(len(part))
    return total


def _lengths(documents: Documents, tokenizer: Tokenizer, indices: Iterable[int]) -> Iterator[int]:
    """Yields the number of tokens of every document that is not left out."""
    for index in indices:
        document = documents[index]
        if document is not None:
            yield len(examples.encode(document, tokenizer))


def _estimated_tokens(documents: Documents, tokenizer: Tokenizer) -> int:
    """Returns about the tokens of an epoch, from documents spread evenly."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, 16).astype(int))
    lengths = [length + 1 for length in _lengths(documents, tokenizer, chosen.tolist())]
    return int(len(documents) * np.mean(lengths)) if lengths else 0


def _check_fills_a_batch(name: str, documents: Documents, tokenizer: Tokenizer, config: ConfigDict) -> None:
    """Raises UserError if one epoch is less than one batch; stops counting at the first batch."""
    rows, tokens = 0, 0
    counted = isinstance(documents, Shards) and config.packing != 'document'
    if counted and documents.totals['tokens'] >= config.batch_size * config.context:
        return
    for length in _lengths(documents, tokenizer, range(len(documents))):
        tokens += length + 1
        rows += math.ceil((length + 1) / config.context)
        enough = rows if config.packing == 'document' else tokens // config.context
        if enough >= config.batch_size:
            return
    raise UserError(
        f'data.source="{name}" holds {tokens} training tokens in {rows} rows at most, less than one batch of '
        f'data.batch_size={config.batch_size} rows of data.context={config.context}'
    )


def _columns(
    order: grain.MapDataset,
    documents: Documents,
    config: ConfigDict,
    objective: str,
    tokenizer: Tokenizer,
    *,
    seed: int,
    sizes: bool,
) -> grain.MapDataset:
    """Reads and tokenizes the documents whose indices `order` holds, some at a time."""
    count = len(documents)
    mean = _estimated_tokens(documents, tokenizer) // max(count, 1) + 1
    # Not much of an epoch at once: Grain's shuffle takes milliseconds an index where there are only a few.
    most = min(_LARGEST_GROUP, count // 16)
    groups = order.batch(max(min(_GROUP_TOKENS // mean, most), 1), batch_fn=list).map(_reader(documents))
    if objective == 'lm':
        return groups.map(examples.lm_columns(tokenizer, sizes=sizes))
    # Seeded by the index, which goes on counting from epoch to epoch: a document is masked anew each time it comes.
    return groups.random_map(masking.mlm_columns(config.mlm, tokenizer), seed=seed)


def _reader(documents: Documents) -> Callable[[list[int]], list[Document]]:
    """Returns the map from indices to the documents that are not left out."""
    if hasattr(documents, '__getitems__'):
        return lambda indices: documents.__getitems__(indices)
    return lambda indices: [document for document in map(documents.__getitem__, indices) if document is not None]


def _read(dataset: grain.MapDataset, config: ConfigDict) -> grain.IterDataset:
    threads = config.read_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads * _READ_AHEAD)
    return dataset.to_iter_dataset(options)


def _pack(
    dataset: grain.IterDataset,
    config: ConfigDict,
    tokenizer: Tokenizer,
    *,
    seed: int | None,
    bins: int,
) -> grain.IterDataset:
    """Rows of `context` tokens; `seed` shuffles the rows that first-fit fills together (None: in order)."""
    length = {'tokens': config.context}
    if config.packing == 'concat':
        return grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct=length)
    dataset = grain.experimental.FlatMapIterDataset(dataset, _Pieces(examples.pieces(config.context, tokenizer.bos_id)))
    if config.packing == 'document':
        return dataset.map(examples.padded_row(config.context))
    return grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct=length,
        num_packing_bins=max(_BINS, bins),
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )


class _Pieces(grain.experimental.FlatMapTransform):
    """One document to many pieces, in Grain's terms."""

    def __init__(self, cut: Callable[[examples.Columns], list[examples.Columns]]) -> None:
        self._cut = cut

    def flat_map(self, element: examples.Columns) -> list[examples.Columns]:
        """Returns the pieces of a document."""
        return self._cut(element)


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


__all__ = ['Batch', 'Document', 'eval_iterator', 'tokens_per_epoch', 'train_iterator']
