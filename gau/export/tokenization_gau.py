"""A SentencePiece model as a tokenizer of `transformers`; the special tokens that it lacks follow its vocabulary."""

import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer


class GAUTokenizer(PreTrainedTokenizer):
    """Texts begin with BOS and, for a bidirectional model, end with EOS, as in training.

    Args:
      vocab_file: the SentencePiece model.
      appended: ids of the special tokens `<bos>`, `<eos>`, `<pad>` and `<mask>` that the model lacks, by name.
      append_eos: whether EOS follows a text.
    """

    vocab_files_names = {'vocab_file': 'tokenizer.model'}  # noqa: RUF012
    model_input_names = ['input_ids', 'attention_mask']  # noqa: RUF012

    def __init__(self, vocab_file, appended=None, append_eos=False, **kwargs):
        self.vocab_file, self.append_eos = vocab_file, append_eos
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.ids = {self.model.IdToPiece(i): i for i in range(self.model.GetPieceSize())}
        self.ids |= {f'<{name}>': token for name, token in (appended or {}).items()}
        self.pieces = {token: piece for piece, token in self.ids.items()}
        super().__init__(appended=appended, append_eos=append_eos, **kwargs)

    @property
    def vocab_size(self):
        """Ids, those of appended special tokens included."""
        return max(self.ids.values()) + 1

    def get_vocab(self):
        """Ids by piece."""
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return self.model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.model.unk_id())

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        """The text of pieces."""
        return self.model.DecodePieces(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """BOS, the text and, for a bidirectional model, EOS."""
        if token_ids_1 is not None:
            raise ValueError('there is no frame for pairs of texts: the model has read single documents')
        return [self.bos_token_id, *token_ids_0, *([self.eos_token_id] if self.append_eos else [])]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Copies the SentencePiece model."""
        name = (f'{filename_prefix}-' if filename_prefix else '') + self.vocab_files_names['vocab_file']
        target = Path(save_directory) / name
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
