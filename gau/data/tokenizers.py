"""Tokenizers behind one face: bytes, SentencePiece models, Hugging Face `tokenizers` files.

Every one has the four special ids BOS, EOS, PAD and MASK: those that a model lacks are appended after its vocabulary.
Text never gives one of them, even where the model itself would take `<mask>` in a text for its piece of that name.
"""

import abc
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from gau.data.special_pieces import huggingface_without, sentencepiece_without
from gau.errors import UserError, did_you_mean, warn

# An unknown token that is in no vocabulary: a model of which it is asked raises.
_NO_TOKEN = '\ufdd0'
_SPECIALS = ('bos', 'eos', 'pad', 'mask')
# What the pieces are called in models that have them.
_NAMES = {
    'bos': ('<bos>', '<s>', '[CLS]', '<|begin_of_text|>', '<|startoftext|>'),
    'eos': ('<eos>', '</s>', '[SEP]', '<|end_of_text|>', '<|endoftext|>'),
    'pad': ('<pad>', '[PAD]', '<|pad|>', '<|padding|>'),
    'mask': ('<mask>', '[MASK]', '<|mask|>'),
}


class Tokenizer(abc.ABC):
    """Text to integers and back.

    Attributes:
      spec: what `load` was given.
      vocab_size: number of ids, specials included.
      bos_id, eos_id, pad_id, mask_id: the special ids.
      fingerprint: of the mapping from text to ids; equal fingerprints mean equal tokens.
    """

    spec: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    mask_id: int
    fingerprint: str

    def encode(self, text: str, *, escape: bool = True) -> np.ndarray:
        """Returns the ids of `text`, int32 [tokens], without specials.

        Characters that the model does not know become its unknown id, lone surrogates `?`.

        Args:
          text: any.
          escape: where the model would take a part of the text for a special piece, encode the text as the same model
            does without that piece.

        Raises:
          UserError: there is such a part and `escape` is off, or no other encoding; the model has no unknown id.
        """
        ids = self._encode(text)
        if not self.spelt_by_text or not (found := self._special[ids]).any():
            return ids
        special = int(ids[found][0])
        if escape:
            ids = self._encode_escaped(text)
            if not self._special[ids].any():
                return ids
        way_out = 'has no other encoding' if escape else 'data.special_in_text="escape" encodes it otherwise'
        piece = self._piece(special)
        raise UserError(
            f'the text "{_excerpt(text, piece)}" gives the special token "{piece}" (id {special}) of '
            f'data.tokenizer="{self.spec}": {way_out}'
        )

    @abc.abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text` by the model itself, int32 [tokens], in which text may give special ids."""

    def _encode_escaped(self, text: str) -> np.ndarray:
        """Returns the ids by the model without the pieces `spelt_by_text`."""
        raise NotImplementedError

    def _piece(self, token: int) -> str:
        """Returns what the model calls a token."""
        raise NotImplementedError

    @functools.cached_property
    def _special(self) -> np.ndarray:
        """Bool [vocab_size]: the ids that text must not give."""
        table = ~self.ordinary
        table[list(self._unknown())] = False
        table[[self.bos_id, self.eos_id, self.pad_id, self.mask_id]] = True
        return table

    @functools.cached_property
    def spelt_by_text(self) -> frozenset[int]:
        """The special ids that the model itself might make of text; mostly none."""
        return frozenset(np.flatnonzero(self._special).tolist()) & self._from_text()

    def _unknown(self) -> set[int]:
        """Returns the id of what the model does not know, if it has one."""
        return set()

    def _from_text(self) -> set[int]:
        """Returns all the ids that the model itself might make of text."""
        return set()

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decodes ids none of which is special or out of the model's own vocabulary."""

    @abc.abstractmethod
    def _starts_word(self) -> np.ndarray:
        """Returns bool [vocab_size]: whether a token with this id begins a word."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; specials are dropped and what is not UTF-8 is replaced by U+FFFD."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        return self._decode(ids[self.ordinary[ids]].tolist())

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """Bool [vocab_size]: the ids that stand for text (not special, not a model's control or unknown id)."""
        table = np.ones(self.vocab_size, bool)
        table[list(self._not_text())] = False
        return table

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """Bool [vocab_size]: whether a token with this id begins a word, with the space before it if any."""
        return self._starts_word()

    def _not_text(self) -> set[int]:
        return {self.bos_id, self.eos_id, self.pad_id, self.mask_id}

    def _set_specials(self, own_size: int, present: dict[str, int | None], contents: bytes) -> None:
        """Appends the specials that a model of `own_size` ids lacks, and takes the fingerprint of all that."""
        size = own_size
        for name in _SPECIALS:
            token = present.get(name)
            if token is None:
                token, size = size, size + 1
            setattr(self, f'{name}_id', token)
        self.own_size, self.vocab_size = own_size, size
        digest = hashlib.sha256(contents)
        digest.update(repr([self.vocab_size, *(getattr(self, f'{name}_id') for name in _SPECIALS)]).encode())
        self.fingerprint = digest.hexdigest()[:16]


class Bytes(Tokenizer):
    """UTF-8 bytes: ids 0..255, then the specials."""

    def __init__(self) -> None:
        self.spec = 'bytes'
        self._set_specials(256, {}, b'bytes')

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode('utf-8', errors='replace'), np.uint8).astype(np.int32)

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode('utf-8', errors='replace')

    def _starts_word(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, bool)
        table[list(b' \t\n\r\v\f')] = True
        return table


class SentencePiece(Tokenizer):
    """A SentencePiece model file. Whether its round trip is exact is the model's own affair (its normalisation)."""

    def __init__(self, path: str) -> None:
        import sentencepiece

        self.spec = f'sentencepiece:{path}'
        contents = _read(path, self.spec)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(contents)
        except RuntimeError as error:
            raise UserError(f'data.tokenizer="{self.spec}": not a SentencePiece model: {error}') from error
        model, self._contents = self._model, contents
        self._pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
        present = {'bos': model.bos_id(), 'eos': model.eos_id(), 'pad': model.pad_id()}
        present = {name: token if token >= 0 else None for name, token in present.items()}
        present['mask'] = next((self._pieces.index(name) for name in _NAMES['mask'] if name in self._pieces), None)
        self._set_specials(len(self._pieces), present, contents)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.EncodeAsIds(_encodable(text)), np.int32)

    def _encode_escaped(self, text: str) -> np.ndarray:
        return np.asarray(self._escaping.EncodeAsIds(_encodable(text)), np.int32)

    @functools.cached_property
    def _escaping(self) -> Any:
        import sentencepiece

        # The unknown piece stays what it is.
        pieces = [token for token in self.spelt_by_text if token != self._model.unk_id()]
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(sentencepiece_without(self._contents, pieces))
        return model

    def _piece(self, token: int) -> str:
        return self._pieces[token]

    def _unknown(self) -> set[int]:
        return {self._model.unk_id()}

    def _from_text(self) -> set[int]:
        never = self._model.IsControl, self._model.IsUnused
        return {i for i in range(self.own_size) if not any(kind(i) for kind in never)}

    def _decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds(ids)

    def _not_text(self) -> set[int]:
        odd = {i for i in range(self.own_size) if self._model.IsControl(i) or self._model.IsUnused(i)}
        return super()._not_text() | odd

    def _starts_word(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, bool)
        table[: self.own_size] = [piece.startswith(('▁', '<0x0A>', '<0x09>', '<0x0D>')) for piece in self._pieces]
        return table


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the Hugging Face `tokenizers` library."""

    def __init__(self, path: str) -> None:
        self.spec = f'huggingface:{path}'
        contents = _read(path, self.spec)
        try:
            self._contents = contents.decode('utf-8')
            self._model = _huggingface_model(self._contents)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f'data.tokenizer="{self.spec}": not a Hugging Face tokenizer file: {error}') from error
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f'data.tokenizer="{self.spec}": its vocabulary is empty, it has not been trained')
        present = {
            name: next((vocabulary[piece] for piece in pieces if piece in vocabulary), None)
            for name, pieces in _NAMES.items()
        }
        self._vocabulary = vocabulary
        # Ids may have gaps, so the largest decides, not the count.
        self._set_specials(max(vocabulary.values()) + 1, present, contents)

    def _encode(self, text: str) -> np.ndarray:
        return self._ids(self._model, text)

    def _encode_escaped(self, text: str) -> np.ndarray:
        return self._ids(self._escaping, text)

    def _ids(self, model: Any, text: str) -> np.ndarray:
        try:
            # Without the specials that a post-processor would add.
            return np.asarray(model.encode(_encodable(text), add_special_tokens=False).ids, np.int32)
        except Exception as error:  # the library raises plain Exception, of a model that has no unknown token
            word = next((word for word in text.split() if not _encodes(model, word)), text)
            message = f'the text "{_excerpt(text, word)}" has what data.tokenizer="{self.spec}" has no token for'
            if getattr(model.model, 'unk_token', None) != _NO_TOKEN:
                raise UserError(f'{message}: {error}') from error
        # A BPE without an unknown token would leave that out without a word. Said once, it may.
        warn(f'{message}: such characters are left out')
        for asked in (self._model, self._escaping):
            asked.model.unk_token = None
        return self._ids(model, text)

    @functools.cached_property
    def _escaping(self) -> Any:
        return _huggingface_model(
            huggingface_without(self._contents, {self._piece(token) for token in self.spelt_by_text})
        )

    def _piece(self, token: int) -> str:
        return next(piece for piece, found in self._vocabulary.items() if found == token)

    def _unknown(self) -> set[int]:
        model = json.loads(self._contents)['model']
        found = model.get('unk_id'), self._vocabulary.get(model.get('unk_token'))
        return {token for token in found if token is not None}

    def _from_text(self) -> set[int]:
        # An added token that is special is passed over, unless the model knows its name by itself.
        added = self._model.get_added_tokens_decoder()
        plain = {token for token, piece in added.items() if not piece.special}
        return plain | set(self._model.get_vocab(with_added_tokens=False).values())

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def _not_text(self) -> set[int]:
        added = self._model.get_added_tokens_decoder()
        gaps = set(range(self.own_size)).difference(self._vocabulary.values())
        return super()._not_text() | gaps | {token for token, piece in added.items() if piece.special}

    def _starts_word(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, bool)
        continued = any(piece.startswith('##') for piece in self._vocabulary)
        for piece, token in self._vocabulary.items():
            # WordPiece marks the continuation of a word, the others its beginning (Ġ, Ċ, ĉ: space, newline, tab).
            table[token] = not piece.startswith('##') if continued else piece.startswith(('Ġ', '▁', 'Ċ', 'ĉ', 'č'))
        return table


def _huggingface_model(contents: str) -> Any:
    import tokenizers

    model = tokenizers.Tokenizer.from_str(contents)
    if isinstance(model.model, tokenizers.models.BPE) and model.model.unk_token is None:
        model.model.unk_token = _NO_TOKEN
    model.no_truncation()
    model.no_padding()
    # Text that spells a special token is text.
    model.encode_special_tokens = True
    return model


def _encodes(model: Any, text: str) -> bool:
    try:
        model.encode(text, add_special_tokens=False)
    except Exception:  # as in HuggingFace._ids
        return False
    return True


_KINDS = {'bytes': Bytes, 'sentencepiece': SentencePiece, 'huggingface': HuggingFace}


@functools.lru_cache(maxsize=4)
def load(spec: str) -> Tokenizer:
    """Returns the tokenizer for `bytes`, `sentencepiece:MODEL_FILE` or `huggingface:TOKENIZER_JSON`.

    Raises:
      UserError: an unknown kind, a missing or broken file.
    """
    kind, _, path = spec.partition(':')
    if kind not in _KINDS:
        raise UserError(f'data.tokenizer="{spec}" is unknown{did_you_mean(kind, _KINDS)}')
    return _KINDS[kind](path) if kind != 'bytes' else Bytes()


def _read(path: str, spec: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'data.tokenizer="{spec}": cannot read {path}: {error.strerror}') from error


def _encodable(text: str) -> str:
    """Replaces lone surrogates (JSON can hold one), which no UTF-8 library takes; the common case costs one scan."""
    try:
        text.encode('utf-8')
        return text
    except UnicodeEncodeError:
        return text.encode('utf-8', errors='replace').decode('utf-8')


def _excerpt(text: str, part: str) -> str:
    """Returns the surroundings of `part` in the text, or its beginning, on one line."""
    place = max(text.find(part), 0)
    return ' '.join(text[max(place - 20, 0) : place + len(part[:40]) + 20].split())
