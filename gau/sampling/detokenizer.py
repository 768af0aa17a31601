"""From blocks of tokens to text that can be printed at once: whole characters, and an end at EOS or a stop string."""

from collections.abc import Iterable, Sequence

from gau.data.tokenizers import Tokenizer

REPLACEMENT = '\ufffd'
# A UTF-8 character has at most four bytes: with byte tokens, an unfinished one has at most three tokens.
UNFINISHED = 3
# Tokens before the new ones that are decoded with them, so that a tokenizer that treats the beginning of a text
# differently (SentencePiece drops a leading space) does not do so at the beginning of a block.
OVERLAP = 4


class Detokenizer:
    """Text of one continuation, bit by bit (incremental detokenization).

    Attributes:
      text: what has been handed out.
      tokens: tokens that were read, the end included.
      finished: why it ended: 'eos', 'stop', or None.
    """

    def __init__(self, tokenizer: Tokenizer, *, before: Sequence[int] = (), stop: Sequence[str] = ()):
        """Takes the prompt's tokens, after which the text goes on, and the strings at which it ends."""
        self.text, self.tokens, self.finished = '', 0, None
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._done: list[int] = [int(token) for token in before][-OVERLAP:]
        self._waiting: list[int] = []
        self._held = ''

    def push(self, tokens: Iterable[int]) -> str:
        """Takes further tokens and returns the text that is certain now; nothing more once it has ended."""
        if self.finished:
            return ''
        tokens = [int(token) for token in tokens]
        ended = self._tokenizer.eos_id in tokens
        if ended:
            tokens = tokens[: tokens.index(self._tokenizer.eos_id)]
        self._waiting += tokens
        self.tokens += len(tokens) + ended
        text = self._release(self._decoded(last=ended), last=ended)
        self.finished = self.finished or ('eos' if ended else None)
        return text

    def close(self) -> str:
        """Returns what was held back: no more tokens will come."""
        return '' if self.finished else self._release(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        """Text of the waiting tokens; those of a character that is not whole yet go on waiting."""
        ready = self._waiting if last else self._certain()
        before = self._tokenizer.decode(self._done)
        text = self._tokenizer.decode(self._done + ready)[len(before) :]
        self._waiting = self._waiting[len(ready) :]
        self._done = self._after_whole_character((self._done + ready)[-OVERLAP:])
        return text

    def _certain(self) -> list[int]:
        """The waiting tokens whose text no further tokens can change."""
        waiting, decode = self._waiting, self._tokenizer.decode
        for cut in range(min(UNFINISHED, len(waiting)) + 1):
            ready = waiting[: len(waiting) - cut]
            if not decode(self._done + ready).endswith(REPLACEMENT):
                return ready
        # Bytes that nothing can mend stand before the last few: cut where no broken character is broken in two.
        for cut in range(UNFINISHED, min(2 * UNFINISHED, len(waiting)) + 1):
            ready, rest = waiting[: len(waiting) - cut], waiting[len(waiting) - cut :]
            if decode(ready) + decode(rest) == decode(waiting):
                return ready
        return []

    def _after_whole_character(self, tokens: list[int]) -> list[int]:
        """Drops tokens from the left until no character is cut in two there."""
        while tokens and self._tokenizer.decode(tokens).startswith(REPLACEMENT):
            tokens = tokens[1:]
        return tokens

    def _release(self, text: str, *, last: bool) -> str:
        """Returns the text up to a stop string, without what may yet turn out to be the beginning of one."""
        text = self._held + text
        ends = [text.find(stop) for stop in self._stop if stop in text]
        if ends:
            text, self._held, self.finished = text[: min(ends)], '', 'stop'
        else:
            keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
