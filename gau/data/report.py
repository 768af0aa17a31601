"""What a model will be fed, in numbers and in words a person can read."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gau import plots
from gau.data import examples, formats, sources
from gau.data.documents import Document, Documents
from gau.data.formats import RowFormat
from gau.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Survey:
    """Sums over (a sample of) the documents of a split.

    Attributes:
      documents: in the split, those left out included.
      surveyed: documents read; left_out: of these, blank or bad ones.
      lengths: tokens of each, int64 [surveyed - left_out].
      n_bytes, n_words: of their text.
      changed: texts that do not come back from the tokenizer as they were (None: prepared tokens have no text).
    """

    documents: int
    surveyed: int
    left_out: int
    lengths: np.ndarray
    n_bytes: int
    n_words: int
    changed: int | None


def survey(config: ConfigDict, split: str, tokenizer: Tokenizer, *, at_most: int) -> Survey:
    """Reads at most `at_most` documents of `split`, spread evenly over each source.

    Raises:
      UserError: as `sources.open_split`.
    """
    opened = sources.open_split(config, split)
    surveyed, lengths, n_bytes, n_words, changed = 0, [], 0, 0, None
    for documents in opened:
        count = len(documents)
        chosen = np.unique(np.linspace(0, max(count - 1, 0), min(count, at_most // len(opened))).astype(int))
        surveyed += len(chosen)
        for index in chosen.tolist():
            document = documents[index]
            if document is None:
                continue
            tokens = examples.encode(document, tokenizer)
            lengths.append(len(tokens))
            size = examples.size(document)
            n_bytes, n_words = n_bytes + size[0], n_words + size[1]
            if document.text is not None:
                changed = (changed or 0) + (tokenizer.decode(tokens) != document.text)
    total = sum(len(documents) for documents in opened)
    left_out = surveyed - len(lengths)
    return Survey(total, surveyed, left_out, np.array(lengths, np.int64), n_bytes, n_words, changed)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Held-out documents that stand in training too, word for word.

    Attributes:
      documents: held-out documents that were compared.
      places: where those stand that training has too.
    """

    documents: int
    places: list[str]


def overlap(config: ConfigDict, split: str) -> Overlap:
    """Compares the documents of a held-out split with all training documents; text is compared with text only.

    Raises:
      UserError: as `sources.open_split`.
    """
    held: dict[bytes, list[str]] = {}
    compared = 0
    for documents in sources.open_split(config, split):
        for index, document in _present(documents):
            place = document.place() if document.place else f'document {index + 1}'
            held.setdefault(_digest(document), []).append(place)
            compared += 1
    opened = sources.open_split(config, 'train')
    found = {}
    # Silent unless it takes a while.
    with tqdm(total=sum(map(len, opened)), desc=f'looking for {split}', unit=' documents', delay=2, leave=False) as bar:
        for documents in opened:
            for _, document in _present(documents, bar.update):
                digest = _digest(document)
                if digest in held:
                    found[digest] = held[digest]
    return Overlap(compared, [place for places in found.values() for place in places])


def _present(documents: Documents, passed: Callable[[int], Any] = lambda _: None) -> Iterator[tuple[int, Document]]:
    for index in range(len(documents)):
        document = documents[index]
        passed(1)
        if document is not None:
            yield index, document


def _digest(document: Document) -> bytes:
    if document.tokens is not None:
        contents = b't' + np.ascontiguousarray(document.tokens, np.int32).tobytes()
    else:
        contents = document.text.strip().encode('utf-8', errors='replace')
    return hashlib.blake2b(contents, digest_size=16).digest()


def histogram(lengths: np.ndarray, *, width: int = 40) -> list[str]:
    """Returns the lines of a histogram of lengths, in powers of two."""
    if not len(lengths):
        return ['(no documents)']
    bins = np.frexp(lengths)[1]
    counts = np.bincount(bins)
    first = int(np.flatnonzero(counts)[0])
    lines = []
    for power in range(first, len(counts)):
        low = 2 ** (power - 1) if power else 0
        bar = '#' * round(width * counts[power] / counts.max())
        lines.append(f'{low:>9,} .. {max(2**power - 1, 0):<9,} {counts[power]:>9,} {bar}')
    return lines


def plot(lengths: np.ndarray, context: int, path: Path) -> None:
    """Writes the histogram of lengths as a PNG, with the context marked."""
    canvas, axes = plots.figure('tokens in a document', 'documents', '')
    top = max(int(lengths.max(initial=1)), context, 2)
    axes.hist(np.maximum(lengths, 1), bins=np.geomspace(1, top + 1, 60), color='tab:blue')
    axes.axvline(context, color='tab:red', label=f'context {context:,}')
    axes.set_xscale('log')
    axes.legend()
    plots.save(canvas, path)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Means over rows: share of places that hold a token, share to predict, and documents (or parts) a row."""

    filled: float
    predicted: float
    documents: float | None


def packing(batches: list[dict[str, np.ndarray]]) -> Packing:
    """Measures packed batches; documents a row are None where the batches carry no segment ids."""
    weights = np.concatenate([batch['weights'] for batch in batches])
    if 'segment_ids' not in batches[0]:
        return Packing(1.0, float(weights.mean()), None)
    segment_ids = np.concatenate([batch['segment_ids'] for batch in batches])
    return Packing(float((segment_ids > 0).mean()), float(weights.mean()), float(segment_ids.max(axis=1).mean()))


def render(batch: dict[str, np.ndarray], row: int, tokenizer: Tokenizer, objective: str | RowFormat) -> str:
    """Returns a row of a batch as text, with specials, borders of documents and masks visible.

    `|2|` begins the second document (part) of the row; `<BOS>`, `<EOS>` and `<PAD x 7>` are specials. For MLM
    `{MASK -> the}` is masked, `{dog -> the}` replaced by a random token, `{the}` kept but to be predicted.
    """
    inputs, targets = batch['inputs'][row], batch['targets'][row]
    chosen = batch['weights'][row] > 0 if formats.get(objective).draws else np.zeros(len(inputs), bool)
    segment_ids = batch['segment_ids'][row] if 'segment_ids' in batch else np.ones(len(inputs), int)
    kinds = np.where(chosen, np.where(inputs == tokenizer.mask_id, 1, np.where(inputs == targets, 3, 2)), 0)
    # A run is what one bracket holds: same document, same fate.
    borders = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(segment_ids) != 0)) + 1
    parts, segment = [], 0
    for run in np.split(np.arange(len(inputs)), borders):
        if segment_ids[run[0]] == 0:
            parts.append(f'<PAD x {len(run)}>')
            continue
        if segment_ids[run[0]] != segment:
            segment = segment_ids[run[0]]
            parts.append(f'|{segment}|')
        fed, wanted = _spelt(inputs[run], tokenizer), _spelt(targets[run], tokenizer)
        parts.append([fed, f'{{MASK -> {wanted}}}', f'{{{fed} -> {wanted}}}', f'{{{fed}}}'][kinds[run[0]]])
    return ''.join(parts)


def _spelt(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Decodes ids with the specials written out."""
    names = {
        tokenizer.bos_id: '<BOS>',
        tokenizer.eos_id: '<EOS>',
        tokenizer.pad_id: '<PAD>',
        tokenizer.mask_id: '<MASK>',
    }
    special = np.isin(ids, list(names))
    borders = np.flatnonzero(special[1:] | special[:-1]) + 1
    return ''.join(
        names[int(run[0])] if int(run[0]) in names else tokenizer.decode(run) for run in np.split(ids, borders)
    )
