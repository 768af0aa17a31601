"""The tokenizer as `AutoTokenizer.from_pretrained` opens it, with the ids and the frame of documents of training.

Bytes and Hugging Face's files become a `tokenizer.json`; a SentencePiece model keeps its file, which
`tokenization_gau.py` reads. A special token that is spelt in a text is that token here, as `transformers` has it, where
training takes it for text.
"""

import shutil
from pathlib import Path
from typing import Any

from gau.data.tokenizers import Tokenizer
from gau.errors import UserError
from gau.export.exporting import write_json
from gau.export.tokenizer_files import NAMES

CODE = Path(__file__).with_name('tokenization_gau.py')
SPECIALS = ('bos', 'eos', 'pad', 'mask')


def write(tokenizer: Tokenizer, directory: Path, *, context: int, causal: bool) -> None:
    """Writes the tokenizer's files.

    Args:
      tokenizer: of the run.
      directory: where to.
      context: tokens of a sequence in training, said to whoever asks for the longest.
      causal: whether a text is followed by its end, as in training of masked models.

    Raises:
      UserError: the ids of the special tokens cannot be had in the library's format.
    """
    kind, _, path = tokenizer.spec.partition(':')
    config: dict[str, Any] = {'model_max_length': context, 'model_input_names': ['input_ids', 'attention_mask']}
    if kind == 'sentencepiece':
        names = _write_sentencepiece(tokenizer, path, directory)
        config |= {
            'tokenizer_class': 'GAUTokenizer',
            'auto_map': {'AutoTokenizer': [f'{CODE.stem}.GAUTokenizer', None]},
            'append_eos': not causal,
            'appended': {name: getattr(tokenizer, f'{name}_id') for name in SPECIALS if _appended(tokenizer, name)},
        }
    else:
        names = _write_json(tokenizer, kind, path, directory, causal=causal)
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'
    config |= {f'{name}_token': piece for name, piece in names.items()}
    write_json(directory / 'tokenizer_config.json', config)


def _appended(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the model lacks a special token, so that it has an id after its vocabulary."""
    return getattr(tokenizer, f'{name}_id') >= tokenizer.own_size


def _write_sentencepiece(tokenizer: Tokenizer, path: str, directory: Path) -> dict[str, str]:
    import sentencepiece

    shutil.copyfile(path, directory / NAMES['sentencepiece'])
    shutil.copyfile(CODE, directory / CODE.name)
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    return {
        name: f'<{name}>' if _appended(tokenizer, name) else model.IdToPiece(getattr(tokenizer, f'{name}_id'))
        for name in SPECIALS
    }


def _write_json(tokenizer: Tokenizer, kind: str, path: str, directory: Path, *, causal: bool) -> dict[str, str]:
    import tokenizers

    if kind == 'bytes':
        fast = _of_bytes()
    else:
        fast = tokenizers.Tokenizer.from_file(path)
        fast.no_truncation()
        fast.no_padding()
    names = {}
    for name in SPECIALS:
        wanted = getattr(tokenizer, f'{name}_id')
        names[name] = f'<{name}>' if _appended(tokenizer, name) else fast.id_to_token(wanted)
        fast.add_special_tokens([tokenizers.AddedToken(names[name], special=True, normalized=False)])
        if fast.token_to_id(names[name]) != wanted:
            raise UserError(
                f'data.tokenizer="{tokenizer.spec}" has gaps between its ids, so that {names[name]} cannot have the id '
                f'{wanted} in a tokenizer.json: --format=safetensors has the weights and the original file'
            )
    # Documents stand as in training: after BOS and, where the model is bidirectional, before EOS.
    frame = f'{names["bos"]} $A' + ('' if causal else f' {names["eos"]}')
    special = [(names[name], getattr(tokenizer, f'{name}_id')) for name in ('bos', 'eos')]
    fast.post_processor = tokenizers.processors.TemplateProcessing(single=frame, special_tokens=special)
    fast.save(str(directory / NAMES['huggingface']))
    return names


def _of_bytes() -> Any:
    """Returns a tokenizer whose ids are the bytes of UTF-8."""
    import tokenizers

    # The library writes a byte as a printable character: itself, or one of those from 256 on.
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast
