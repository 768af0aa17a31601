"""Tokenizer models in which no text spells a special piece.

Some models hold `<s>`, `<mask>` and the like among the pieces that text is made of: a Unigram model trained with them,
a BPE that met them in its corpus, a piece added as plain text. Here the same model is made without these pieces; all
other pieces keep their ids.
"""

import json
from collections.abc import Collection
from typing import Any

# Renames a piece to what no text holds: noncharacters, which Unicode keeps for uses within a program.
_HIDDEN = '\ufdd0{}\ufdd1'


def sentencepiece_without(contents: bytes, ids: Collection[int]) -> bytes:
    """Returns the SentencePiece model `contents` with the pieces `ids` turned into control symbols."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(contents)
    for token in ids:
        model.pieces[token].type = model.pieces[token].CONTROL
    return model.SerializeToString()


def huggingface_without(contents: str, pieces: Collection[str]) -> str:
    """Returns the `tokenizer.json` `contents` in which the given pieces are called what no text holds."""
    tokenizer = json.loads(contents)
    hidden = {piece: _HIDDEN.format(piece) for piece in pieces}
    # Renamed and not dropped: the library counts the ids of added tokens by their number.
    for added in tokenizer.get('added_tokens') or ():
        added['content'] = hidden.get(added['content'], added['content'])
    # It names special tokens, and is not asked.
    tokenizer['post_processor'] = None
    _hide(tokenizer['model'], hidden)
    return json.dumps(tokenizer)


def _hide(model: dict[str, Any], hidden: dict[str, str]) -> None:
    vocabulary = model['vocab']
    if isinstance(vocabulary, list):  # Unigram: (piece, score) pairs
        model['vocab'] = [[hidden.get(piece, piece), *rest] for piece, *rest in vocabulary]
    else:
        model['vocab'] = {hidden.get(piece, piece): token for piece, token in vocabulary.items()}
    if model.get('unk_token') in hidden:
        model['unk_token'] = hidden[model['unk_token']]
    if 'merges' in model:
        prefix = model.get('continuing_subword_prefix') or ''
        model['merges'] = [merge for merge in model['merges'] if hidden.keys().isdisjoint(_parts(merge, prefix))]


def _parts(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """Returns the two pieces that a merge of BPE joins, and what comes of it."""
    left, right = merge.split(' ') if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)
