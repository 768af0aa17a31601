"""Classification: labels of texts, or of pairs of texts, and the rows that are made of them.

A row is BOS text EOS, for a pair BOS text EOS second text EOS, padded. What does not fit is cut off at the end of the
text; of a pair, at the end of the longer one.
"""

from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import sources
from gau.data.documents import Document, Documents, nested
from gau.data.examples import BEGIN, INPUTS, TARGETS, WEIGHTS, Columns, encode
from gau.data.tokenizers import Tokenizer
from gau.errors import UserError

# BOS and two EOS, and a token of each text.
LEAST_CONTEXT = 5


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the section `data`, made whole and checked, with the labels of the training split if it names none.

    Raises:
      UserError: see `gau.data.config.resolve`; documents without labels, or fewer than two different labels.
    """
    config = config.copy_and_resolve_references()
    if config.shuffle == 'rows' and config.shuffle_window is None:
        # A row is a document here.
        config.shuffle = 'documents'
    config = data_config.resolve(config, objective='classification')
    if config.context < LEAST_CONTEXT:
        raise UserError(f'data.context={config.context} must be at least {LEAST_CONTEXT} for classification')
    if not config.classification.labels:
        found = {label for documents in sources.open_split(config, 'train') for label, _ in _labels(config, documents)}
        config.classification.labels = tuple(sorted(found, key=_by_number))
    labels = tuple(str(label) for label in config.classification.labels)
    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise UserError(f'data.classification.labels={labels}: want two or more, all of them different')
    config.classification.labels = labels
    return config


def check_split(config: ConfigDict, split: str) -> None:
    """Raises UserError unless `split` exists and holds texts, all of whose labels are known."""
    known = set(config.classification.labels)
    for documents in sources.open_split(config, split):
        for label, place in _labels(config, documents):
            if label not in known:
                raise _unseen(place(), label, config)


def count(config: ConfigDict, split: str) -> int:
    """Returns how many examples a split has."""
    return sum(1 for documents in sources.open_split(config, split) for _ in _labels(config, documents))


def columns(config: ConfigDict, tokenizer: Tokenizer) -> Callable[[list[Document]], Columns | None]:
    """Returns the map from documents to columns: the number of the label is every token's target, the last one counts.

    Args:
      config: the resolved data config.
      tokenizer: of the texts; gives EOS.
    """
    numbers = {label: number for number, label in enumerate(config.classification.labels)}

    def of_one(document: Document) -> np.ndarray | None:
        label = label_of(document, config)
        if label is None:
            return None
        if label not in numbers:
            raise _unseen(_place(document), label, config)
        texts = [encode(document, tokenizer)]
        second = second_text(document, config)
        if second is not None:
            texts.append(encode(Document(text=second, place=document.place, escape=document.escape), tokenizer))
        texts = cut(texts, config.context - 1 - len(texts))
        ids = np.concatenate([[BEGIN], *(part for text in texts for part in (text, [tokenizer.eos_id]))])
        table = np.zeros((len(ids), 3), np.int32)
        table[:, INPUTS], table[:, TARGETS], table[-1, WEIGHTS] = ids, numbers[label], 1
        return table

    def of_group(documents: list[Document]) -> Columns | None:
        tables = [table for table in map(of_one, documents) if table is not None]
        return {'tokens': np.concatenate(tables)} if tables else None

    return of_group


def cut(texts: list[np.ndarray], room: int) -> list[np.ndarray]:
    """Returns one or two texts cut to at most `room` tokens together, the longer one first."""
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = (len(text) for text in texts)
    if first + second <= room:
        return texts
    # The shorter one keeps what it has up to half of the room.
    kept = min(first, max(room - second, (room + 1) // 2))
    return [texts[0][:kept], texts[1][: room - kept]]


def label_of(document: Document, config: ConfigDict) -> str | None:
    """Returns the label of a document as text; None where it has none and such documents are left out.

    Raises:
      UserError: there is none, or it is neither text nor an integer.
    """
    field = config.classification.label_field
    try:
        label = nested(document.record or {}, field)
    except KeyError:
        problem = f'no field "{field}" (data.classification.label_field)'
    else:
        if isinstance(label, str | int) and not isinstance(label, bool) and str(label).strip():
            return str(label)
        problem = f'the field "{field}" must be a text or an integer, not {label!r}'
    if config.bad_lines == 'skip':
        return None
    raise UserError(f'{_place(document)}: {problem}; data.bad_lines="skip" leaves such documents out')


def second_text(document: Document, config: ConfigDict) -> str | None:
    """Returns the other text of a pair; None for a text alone.

    Raises:
      UserError: it is not text.
    """
    field = config.classification.second_text_field
    try:
        text = nested(document.record or {}, field)
    except KeyError:
        return None
    if text is not None and not isinstance(text, str):
        raise UserError(f'{_place(document)}: the field "{field}" is {type(text).__name__}, not text')
    return text


def _labels(config: ConfigDict, documents: Documents) -> Iterator[tuple[str, Callable[[], str]]]:
    for index in range(len(documents)):
        document = documents[index]
        label = None if document is None else label_of(document, config)
        if label is not None:
            yield label, lambda document=document: _place(document)


def _place(document: Document) -> str:
    return document.place() if document.place else 'a document'


def _unseen(place: str, label: str, config: ConfigDict) -> UserError:
    known = config.classification.labels
    shown = ', '.join(known[:5]) + (f' and {len(known) - 5} more' if len(known) > 5 else '')
    return UserError(f'{place}: the label "{label}" is not one of training ({shown})')


def _by_number(label: str) -> tuple[int, int, str, str]:
    """Orders labels, numbers first and by their size; "1" and "01" are two, which must not stand as a set has them."""
    digits = label.lstrip('0') if label.isascii() and label.isdigit() else None
    return (1, 0, '', label) if digits is None else (0, len(digits), digits, label)
