"""Data that has moved: what the data is, wherever it lies.

A work directory keeps, beside its config, what the data and the tokenizer are (`record`). Paths that differ from the
config's then mean the same run if what lies there is the same: a project may be moved or copied, and run from another
directory.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import sources, tokenizers
from gau.errors import UserError

# The fields of the data config that say where something lies.
FIELDS = ('source', 'valid_source', 'test_source', 'mixture', 'tokenizer', 'tfds_dir')


def record(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what the data and the tokenizer of a resolved data config are, and where one stood when it was found.

    Raises:
      UserError: something is missing.
    """
    return {'directories': _directories(workdir), 'contents': contents(config)}


def _directories(workdir: str | os.PathLike[str]) -> list[str]:
    return [os.getcwd(), os.path.abspath(workdir)]


def contents(config: ConfigDict) -> list[str]:
    """Returns a line for each source, those of held-out splits included, and one for the tokenizer; no paths in them.

    Raises:
      UserError: something is missing.
    """
    held_out = [field for field in ('valid_source', 'test_source') if config[field]]
    return [
        *(f'weight {weight:g}' for weight in _weights(config)),
        *(f'source {sources.contents(config, source)}' for source in data_config.sources(config)),
        *(f'{field} {sources.contents(config, config[field])}' for field in held_out),
        f'tokenizer {tokenizers.load(config.tokenizer).fingerprint}',
    ]


def are_same(recorded: dict[str, Any], config: ConfigDict) -> bool:
    """Returns whether a resolved data config names what was recorded. Raises UserError if something is missing."""
    return recorded['contents'] == contents(config)


def are_as_identified(identities: dict[str, str], before: ConfigDict, config: ConfigDict) -> bool:
    """Returns whether a resolved data config names what a checkpoint says it was made of; for runs without a record.

    Args:
      identities: `sources.identity` of that time, with the tokenizer's fingerprint under `tokenizer`.
      before: the resolved data config of that time.
      config: that of now, which differs in places alone.
    """
    pairs = list(zip(sources.named(before), sources.named(config), strict=False))
    same = len(pairs) == len(sources.named(before)) == len(sources.named(config))
    same = same and _weights(before) == _weights(config)
    return (
        same
        and all(
            identities.get(old) == sources.identity_of(config, new, moved=_move_between(old, new)) for old, new in pairs
        )
        and identities.get('tokenizer') == tokenizers.load(config.tokenizer).fingerprint
    )


def _weights(config: ConfigDict) -> list[float]:
    return [weight for weight, _ in data_config.mixture(config)] if config.source == 'mixture' else []


def _move_between(old: str, new: str) -> tuple[str, str]:
    """Returns what differs at the beginning of two paths, up to whole names."""
    old, new = (source.partition(':')[2].partition(',')[0] for source in (old, new))
    while old and new and os.path.basename(old) == os.path.basename(new):
        old, new = os.path.dirname(old), os.path.dirname(new)
        if '/' in (old, new):
            break
    return old, new


def found_again(recorded: dict[str, Any], config: ConfigDict, workdir: str | os.PathLike[str]) -> ConfigDict:
    """Returns a recorded data config with its paths as they are after a move; as it is if none leads to that data.

    Args:
      recorded: what `record` returned.
      config: the resolved data config of that time.
      workdir: where the work directory is now.
    """
    moves = list(_moves(recorded['directories'], _directories(workdir)))
    # No move at all comes first, so that a copy is not preferred to what the run has read.
    for old, new in [(None, None), *moves] if moves else []:
        moved = config.copy_and_resolve_references()
        for field in FIELDS:
            moved[field] = config[field] if old is None else _moved(config[field], old, new)
        try:
            if are_same(recorded, moved):
                return moved
        except UserError:
            continue
    return config


def _moves(before: list[str], now: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (old, new) places of directories that may have moved together with one whose both places are known."""
    for old, new in zip(before, now, strict=True):
        while old != new:
            yield old, new
            # The same names at the end: what moved may be a directory above.
            (old, old_name), (new, new_name) = os.path.split(old), os.path.split(new)
            if old_name != new_name or not old_name:
                break


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_moved(entry, old, new) for entry in value)
    if not isinstance(value, str):
        return value
    kind, colon, rest = value.partition(':')
    if not colon:
        return _moved_path(value, old, new)
    if kind not in ('text', 'jsonl'):
        return f'{kind}:{_moved_path(rest, old, new)}'
    return f'{kind}:{",".join(_moved_path(part, glob.escape(old), glob.escape(new)) for part in rest.split(","))}'


def _moved_path(path: str, old: str, new: str) -> str:
    return new + path.removeprefix(old) if path == old or path.startswith(f'{old.rstrip(os.sep)}{os.sep}') else path
