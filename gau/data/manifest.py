"""The manifest of a directory of prepared token shards: what is in it, and how it was made."""

import hashlib
import json
import os
import pathlib
from typing import Any

from gau.errors import UserError

FILE = 'manifest.json'
FORMAT = 'gau-tokens-1'


def read(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the manifest of `directory`.

    Raises:
      UserError: no manifest (not prepared, or not finished), or one that is not ours.
    """
    path = pathlib.Path(directory) / FILE
    try:
        contents = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise UserError(f'tokens:{directory}: no such directory') from error
        raise UserError(
            f'tokens:{directory}: no {FILE} there: prepare it, or finish preparing it, with scripts/prepare_data.py'
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: unreadable manifest: {error}') from error
    if not isinstance(contents, dict) or contents.get('format') != FORMAT:
        raise UserError(f'{path}: not a manifest of prepared tokens in the format {FORMAT}')
    return contents


def identity(directory: str | os.PathLike[str]) -> str:
    """Returns a hash of the manifest of `directory`, which holds what every shard was made of. Raises as `read`."""
    return hashlib.sha256(json.dumps(read(directory), sort_keys=True).encode()).hexdigest()[:16]


def contents(directory: str | os.PathLike[str]) -> str:
    """Returns a hash of what the shards in `directory` hold, whatever they were made of. Raises as `read`."""
    found = read(directory)
    held = [found['tokenizer']['fingerprint'], found['dtype'], found['splits']]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_spec(directory: str | os.PathLike[str]) -> str:
    """Returns the `data.tokenizer` that the shards in `directory` were made with, its file being the copy there."""
    kind, colon, name = read(directory)['tokenizer']['spec'].partition(':')
    return f'{kind}:{os.path.join(directory, name)}' if colon else kind
