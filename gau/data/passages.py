"""Passages of long documents, with a label of these: data to classify, made of documents that have a field for it.

Whole documents are held out, so that what is measured is the label and not the document.
"""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gau import outputs
from gau.data.documents import nested
from gau.data.textfiles import TextFiles
from gau.errors import UserError

# The first and the last passages of a document are left out: title pages and imprints name the label.
_MARGIN = 2


def write(
    output: Path,
    *,
    source: str,
    held_out: str | None,
    label_field: str,
    text_field: str = 'text',
    classes: int = 20,
    left_out: Sequence[str] = (),
    characters: int = 4000,
    train: int = 400,
    valid: int = 60,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes DIR/train.jsonl, DIR/valid.jsonl (`label`, `text`) and DIR/report.json.

    Args:
      output: directory to make.
      source: globs of JSON lines.
      held_out: globs of documents that must not be trained on.
      label_field, text_field: of the lines.
      classes: how many labels, those with most text; their spelling may differ in case and accents.
      left_out: labels that are none, such as "Various".
      characters: of a passage, which is cut at a blank.
      train, valid: passages of each label in each file.
      seed: decides which passages are taken.

    Returns:
      What report.json holds: of each label the passages and the documents of both files.

    Raises:
      UserError: there is something at `output`; a label to leave out that no document has; too few labels, or one that
        has too little text outside the held-out documents.
    """
    outputs.check_directory(output)
    documents = [*_read(source, label_field, text_field, False)]
    if held_out:
        documents += _read(held_out, label_field, text_field, True)
    chosen = _of_labels(documents, classes, left_out, label_field)
    if len(chosen) < classes:
        raise UserError(
            f'--source={source}: {len(chosen)} different labels in "{label_field}", {classes} are asked for'
        )
    rng = np.random.default_rng(seed)
    files: dict[str, list[dict[str, str]]] = {'train': [], 'valid': []}
    report = {}
    for of_label in chosen:
        held, kept = _split(of_label, characters, valid)
        name = of_label[0]['label']
        report[name] = {}
        for split, found, wanted in (('train', kept, train), ('valid', held, valid)):
            passages = [passage for document in found for passage in cut(document['text'], characters)]
            if len(passages) < wanted:
                raise UserError(
                    f'"{name}" has {len(passages)} passages of {characters} characters for {split}, {wanted} are asked '
                    'for: ask for fewer, or for fewer classes'
                )
            taken = rng.choice(len(passages), wanted, replace=False)
            files[split] += [{'label': name, 'text': passages[i]} for i in sorted(taken.tolist())]
            report[name][split] = {'passages': wanted, 'documents': len(found)}
    with outputs.directory(output) as aside:
        for split, lines in files.items():
            order = rng.permutation(len(lines))
            text = ''.join(json.dumps(lines[i], ensure_ascii=False) + '\n' for i in order)
            (aside / f'{split}.jsonl').write_text(text, encoding='utf-8')
        (aside / 'report.json').write_text(json.dumps(report, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return report


def _of_labels(
    documents: list[dict[str, Any]], classes: int, left_out: Sequence[str], label_field: str
) -> list[list[dict[str, Any]]]:
    """Returns the documents of each of the labels with most text, at most `classes`, in the order of the labels."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        by_label.setdefault(_folded(document['label']), []).append(document)
    for label in left_out:
        if by_label.pop(_folded(label), None) is None:
            raise UserError(f'--left_out: no document has "{label}" in "{label_field}"')
    sizes = {label: sum(len(document['text']) for document in found) for label, found in by_label.items()}
    chosen = sorted(sizes, key=sizes.get, reverse=True)[:classes]
    return [by_label[label] for label in sorted(chosen)]


def cut(text: str, characters: int) -> Iterator[str]:
    """Yields the text in passages of about so many characters, from blank to blank, without its beginning and end."""
    borders = [0]
    while borders[-1] + characters < len(text):
        blank = text.find(' ', borders[-1] + characters)
        if blank < 0:
            break
        borders.append(blank)
    for start, end in zip(borders[_MARGIN:-_MARGIN], borders[_MARGIN + 1 : len(borders) - _MARGIN + 1], strict=True):
        yield text[start:end].strip()


def _read(globs: str, label_field: str, text_field: str, held_out: bool) -> Iterator[dict[str, Any]]:
    files = TextFiles(globs.removeprefix('jsonl:'), unit='json', field=text_field, bad='error', cache_dir=None)
    for index in range(len(files)):
        document = files[index]
        if document is None:
            continue
        try:
            label = nested(document.record, label_field)
        except KeyError as error:
            raise UserError(f'{document.place()}: no field "{label_field}" (--label_field)') from error
        yield {'label': str(label), 'text': document.text, 'held_out': held_out}


def _split(
    documents: list[dict[str, Any]], characters: int, wanted: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the documents held out, and the others; beside those that must be, the shortest until there is enough."""
    held = [document for document in documents if document['held_out']]
    kept = sorted(
        (document for document in documents if not document['held_out']), key=lambda found: len(found['text'])
    )
    count = sum(1 for document in held for _ in cut(document['text'], characters))
    while count < wanted and len(kept) > 1:
        held.append(kept.pop(0))
        count += sum(1 for _ in cut(held[-1]['text'], characters))
    return held, kept


def _folded(label: str) -> str:
    """Returns a label without case and accents."""
    plain = unicodedata.normalize('NFKD', label)
    return ' '.join(''.join(c for c in plain if not unicodedata.combining(c)).casefold().split())
