"""Which documents a config means: its sources, their splits, and opening them."""

import functools
import hashlib
import json
import os

from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import documents as docs
from gau.data import embedded, globs, manifest, textfiles, tfds_source, tokenizers
from gau.data.documents import Documents
from gau.data.shards import Shards
from gau.data.textfiles import TextFiles
from gau.errors import UserError, did_you_mean, warn


def splits(config: ConfigDict) -> list[str]:
    """Returns the splits of the (resolved) data config that every one of its sources has, `train` first."""
    common: list[str] | None = None
    for source in data_config.sources(config):
        own = _splits_of(config, source)
        common = own if common is None else [split for split in common if split in own]
    return common or []


def open_split(config: ConfigDict, split: str) -> list[Documents]:
    """Returns the documents of `split`, one sequence for each source of the (resolved) data config.

    The `valid_source` or `test_source` of several text sources is opened once, so the list may then be shorter.

    Raises:
      UserError: no such split; missing, empty or broken files; a held-out split without any text.
    """
    if split not in splits(config):
        raise UserError(f'data.source="{config.source}" has no split "{split}"{did_you_mean(split, splits(config))}')
    opened = {}
    for number, source in enumerate(data_config.sources(config)):
        own = _separate(config, source, split)
        # The same source may stand twice in a mixture, a separate one for all of them only once.
        key = own or number
        if key not in opened:
            documents = _open_whole(config, own, split) if own else _open(config, source, split)
            opened[key] = docs.Unescaped(documents) if config.special_in_text == 'error' else documents
    if split == 'train':
        _warn_of_shared_files(config)
    elif not any(document is not None for documents in opened.values() for document in documents):
        raise UserError(
            f'the split "{split}" has no text to evaluate, for {_separate_of(config, split) or config.source} gives it '
            f'{sum(map(len, opened.values()))} documents, all of them blank or left out'
        )
    return list(opened.values())


def _warn_of_shared_files(config: ConfigDict) -> None:
    """Says which files of their own the held-out splits have in common with the training documents."""
    trained: dict[str, str] | None = None
    for split in ('valid', 'test'):
        own = _separate_of(config, split)
        if own is None or not _is_text(own):
            continue
        if trained is None:
            texts = [source for source in data_config.sources(config) if _is_text(source)]
            trained = {os.path.realpath(name): name for source in texts for name in globs.expand(_argument(source))}
        shared = [name for name in globs.expand(_argument(own)) if os.path.realpath(name) in trained]
        if shared:
            warn(
                f'data.{split}_source: {len(shared)} of its files are in data.source too ({shared[0]}), '
                'so its loss is that of text trained on'
            )


def _separate(config: ConfigDict, source: str, split: str) -> str | None:
    """Returns the source of its own that takes the place of what `source` has for `split`, if any."""
    kinds = ('text', 'jsonl') if any(map(_is_text, data_config.sources(config))) else ('tokens',)
    return _separate_of(config, split) if data_config.source_kind(source) in kinds else None


def _separate_of(config: ConfigDict, split: str) -> str | None:
    return {'valid': config.valid_source, 'test': config.test_source}.get(split)


def _is_text(source: str) -> bool:
    return data_config.source_kind(source) in ('text', 'jsonl')


def _splits_of(config: ConfigDict, source: str) -> list[str]:
    kind = data_config.source_kind(source)
    if kind == 'embedded':
        own = list(embedded.SPLITS)
    elif kind == 'tokens':
        own = list(manifest.read(_argument(source))['splits'])
    elif kind == 'pairs':
        raise UserError(f'data.source={source} holds no documents: its rows are drawn for objective=recall')
    elif kind == 'tfds':
        own = tfds_source.splits(_argument(source), config.tfds_dir)
    else:
        own = ['train', *(['valid'] if config.holdout_every else [])]
    return own + [split for split in ('valid', 'test') if split not in own and _separate(config, source, split)]


def _open(config: ConfigDict, source: str, split: str) -> Documents:
    kind = data_config.source_kind(source)
    if kind == 'embedded':
        names, texts = zip(*embedded.split_text(split), strict=True)
        return docs.Texts(texts, names, [{'label': embedded.kind(name), 'title': name} for name in names])
    if kind == 'tokens':
        return Shards(_argument(source), split, tokenizers.load(config.tokenizer))
    if kind == 'tfds':
        return tfds_source.TfdsText(_argument(source), split, field=config.text_field, data_dir=config.tfds_dir)
    documents = _open_text(config, source)
    return docs.hold_out(documents, every=config.holdout_every, split=split) if config.holdout_every else documents


def _open_whole(config: ConfigDict, source: str, split: str) -> Documents:
    """Opens a source that stands for one split alone."""
    if data_config.source_kind(source) != 'tokens':
        return _open_text(config, source)
    found = list(manifest.read(_argument(source))['splits'])
    if split in found:
        return _open(config, source, split)
    return docs.Joined([_open(config, source, part) for part in found])


def text_files(config: ConfigDict) -> list[list[str | int]]:
    """Returns name, size and time of every text file behind the config: equal means the same documents."""
    texts = [source for source in named(config) if _is_text(source)]
    return [entry for source in texts for entry in textfiles.identity(_argument(source))]


def identity(config: ConfigDict) -> dict[str, str]:
    """Returns what tells whether the data behind the (resolved) data config changed: a line for each of its sources.

    Nothing but names, sizes and times of files is read, the manifest of prepared tokens, or the built-in corpus. How
    the config cuts documents out of that, and with which tokenizer, is not in it.

    Raises:
      UserError: missing files, no such directory or data set.
    """
    return {source: identity_of(config, source) for source in named(config)}


def named(config: ConfigDict) -> list[str]:
    """Returns all sources that the (resolved) data config names, those of held-out splits last."""
    return [source for source in (*data_config.sources(config), config.valid_source, config.test_source) if source]


def identity_of(config: ConfigDict, source: str, *, moved: tuple[str, str] = ('', '')) -> str:
    """Returns the line of `identity` for one source; text files are named as before a move (from, to) of theirs."""
    kind = data_config.source_kind(source)
    if kind == 'embedded':
        return embedded.identity()
    if kind == 'tokens':
        return f'manifest {manifest.identity(_argument(source))}'
    if kind == 'tfds':
        return tfds_source.identity(_argument(source), config.tfds_dir)
    if kind == 'pairs':
        return 'drawn'
    old, new = moved
    files = [
        [old + name.removeprefix(new) if name.startswith(new) else name, *rest]
        for name, *rest in textfiles.identity(_argument(source))
    ]
    return f'{len(files)} files, {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}'


def contents(config: ConfigDict, source: str) -> str:
    """Returns what `source` holds, as `identity` does, but without a word of where it lies or when it came there.

    Of text files it is sizes, the last parts of names, and samples of what is in them. Raises as `identity`.
    """
    if data_config.source_kind(source) == 'tokens':
        return manifest.contents(_argument(source))
    return textfiles.contents(_argument(source)) if _is_text(source) else identity_of(config, source)


def _argument(source: str) -> str:
    return source.partition(':')[2]


def _open_text(config: ConfigDict, source: str) -> TextFiles:
    kind = data_config.source_kind(source)
    unit = 'json' if kind == 'jsonl' else config.text_unit or 'file'
    field = (config.text_field or 'text') if kind == 'jsonl' else None
    return _text_files(_argument(source), unit, field, config.bad_lines, config.cache_dir)


@functools.lru_cache(maxsize=16)
def _text_files(files: str, unit: str, field: str | None, bad: str, cache_dir: str | None) -> TextFiles:
    """Training and its held-out documents come from one scan."""
    return TextFiles(files, unit=unit, field=field, bad=bad, cache_dir=cache_dir)
