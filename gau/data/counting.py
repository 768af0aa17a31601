"""How much there is: the places an epoch takes, and whether it fills a batch."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import grain
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gau.data import examples, formats, packing, sources
from gau.data.documents import Documents
from gau.data.formats import RowFormat
from gau.data.shards import Shards
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

# What is packed to measure how full first-fit packing makes rows: documents to draw from, pieces at most.
_SAMPLE = 4096
_PIECES = 2**14


def places_per_epoch(config: ConfigDict, tokenizer: Tokenizer, objective: str | RowFormat = 'lm') -> int:
    """Returns how many places of rows one pass over the training documents takes, padding included.

    A document takes its own tokens and one for BOS and EOS (MLM: two). Exact for the packing `concat`, from the
    manifest of prepared tokens or by one pass over the text, and for `document`, by one pass over either. For
    `first_fit` an estimate: the exact tokens, divided by the share of the places that is filled when the same packer
    packs documents spread evenly over the epoch (within some percent of what training takes).
    """
    frame, context = formats.get(objective).frame, config.context
    total = 0
    for documents in sources.open_split(config, 'train'):
        if config.packing == 'document':
            total += _sum(documents, tokenizer, lambda length: math.ceil((length + frame) / context) * context)
            continue
        if isinstance(documents, Shards):
            tokens = documents.totals['tokens'] + frame * documents.totals['documents']
        else:
            tokens = _sum(documents, tokenizer, lambda length: length + frame)
        filled = _filled(documents, config, tokenizer, frame) if config.packing == 'first_fit' else 1.0
        total += math.ceil(tokens / filled)
    return total


def _sum(documents: Documents, tokenizer: Tokenizer, places: Callable[[int], int]) -> int:
    """Tokenizes everything once, on all cores as far as the tokenizer's library releases the interpreter."""
    count = len(documents)
    # A part is some milliseconds of work, so that threads share the work evenly and the bar moves.
    parts = [range(start, min(start + 32, count)) for start in range(0, count, 32)]

    def places_of(part: range) -> int:
        return sum(map(places, lengths(documents, tokenizer, part)))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # Silent unless it takes a while.
        bar = tqdm(total=count, desc='counting tokens', unit=' documents', delay=2, leave=False)
        with bar:
            total = 0
            for part, some in zip(parts, pool.map(places_of, parts), strict=True):
                total += some
                bar.update(len(part))
    return total


def _filled(documents: Documents, config: ConfigDict, tokenizer: Tokenizer, frame: int) -> float:
    """Returns the share of the places that first-fit packing fills, measured on documents spread evenly."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, _SAMPLE).astype(int))
    sample = np.array([length + frame for length in lengths(documents, tokenizer, chosen.tolist())])
    if not len(sample):
        return 1.0
    order = grain.MapDataset.source(sample)
    if config.shuffle != 'none':
        order = order.shuffle(seed=0)

    def columns(length: int) -> examples.Columns:
        table = np.zeros((int(length), 2), np.int32)
        table[0, examples.INPUTS] = examples.BEGIN
        return {'tokens': table}

    # An epoch goes over into the next without a seam, so the sample goes round.
    dataset = order.repeat(None).map(columns).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = packing.pack(dataset, config, seed=None, bins=config.batch_size)
    together = max(packing.BINS, config.batch_size)
    rows = iter(dataset)
    tokens = pieces = 0
    for count in itertools.count(1):
        segments = next(rows)['tokens_segment_ids']
        tokens, pieces = tokens + np.count_nonzero(segments), pieces + int(segments.max())
        once = tokens >= sample.sum() and count >= 4 * together
        if count % together == 0 and (once or pieces >= _PIECES):
            return float(tokens / (count * config.context))
    raise AssertionError('the sample goes round without end')


def lengths(documents: Documents, tokenizer: Tokenizer, indices: Iterable[int]) -> Iterator[int]:
    """Yields the number of tokens of every document that is not left out."""
    for index in indices:
        document = documents[index]
        if document is not None:
            yield len(examples.encode(document, tokenizer))


def estimated_tokens(documents: Documents, tokenizer: Tokenizer) -> int:
    """Returns about the tokens of an epoch, from documents spread evenly."""
    chosen = np.unique(np.linspace(0, len(documents) - 1, 16).astype(int))
    found = [length + 1 for length in lengths(documents, tokenizer, chosen.tolist())]
    return int(len(documents) * np.mean(found)) if found else 0


def check_fills_a_batch(name: str, documents: Documents, tokenizer: Tokenizer, config: ConfigDict) -> None:
    """Raises UserError if one epoch is less than one batch; stops counting at the first batch."""
    rows, tokens = 0, 0
    counted = isinstance(documents, Shards) and config.packing != 'document'
    if counted and documents.totals['tokens'] >= config.batch_size * config.context:
        return
    for length in lengths(documents, tokenizer, range(len(documents))):
        tokens += length + 1
        rows += math.ceil((length + 1) / config.context)
        enough = rows if config.packing == 'document' else tokens // config.context
        if enough >= config.batch_size:
            return
    raise UserError(
        f'data.source="{name}" holds {tokens} training tokens in {rows} rows at most, less than one batch of '
        f'data.batch_size={config.batch_size} rows of data.context={config.context}'
    )
