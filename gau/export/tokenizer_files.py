"""The tokenizer beside an exported model, as its own file."""

import shutil
from pathlib import Path
from typing import Any

from gau.data.tokenizers import Tokenizer

# By the kinds of `data.tokenizer`; bytes need none.
NAMES = {'sentencepiece': 'tokenizer.model', 'huggingface': 'tokenizer.json'}


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what there is to know of a tokenizer beside its file."""
    kind = tokenizer.spec.partition(':')[0]
    return {
        'kind': kind,
        'file': NAMES.get(kind),
        'vocab_size': tokenizer.vocab_size,
        'bos_id': tokenizer.bos_id,
        'eos_id': tokenizer.eos_id,
        'pad_id': tokenizer.pad_id,
        'mask_id': tokenizer.mask_id,
        'fingerprint': tokenizer.fingerprint,
    }


def copy(tokenizer: Tokenizer, directory: Path) -> None:
    """Copies the tokenizer's file, if it has one, under its name of NAMES."""
    kind, _, path = tokenizer.spec.partition(':')
    if path:
        shutil.copyfile(path, directory / NAMES[kind])
