"""Text from tokens, bit by bit."""

import numpy as np
import pytest

from gau.data.tokenizers import load
from gau.sampling.detokenizer import Detokenizer

TOKENIZER = load('bytes')
TEXT = 'Zoë — 漢字 😀 “x”, end'


@pytest.mark.parametrize('block', [1, 2, 3, 7, 100])
def test_text_comes_in_whole_characters_whatever_the_blocks(block):
    tokens = TOKENIZER.encode(TEXT)
    detokenizer = Detokenizer(TOKENIZER, before=TOKENIZER.encode('é'))
    parts = [detokenizer.push(tokens[i : i + block]) for i in range(0, len(tokens), block)]
    assert '\ufffd' not in ''.join(parts)
    assert ''.join(parts) + detokenizer.close() == TEXT == detokenizer.text
    assert (detokenizer.tokens, detokenizer.finished) == (len(tokens), None)


def test_bytes_that_are_no_text_are_not_waited_for():
    detokenizer = Detokenizer(TOKENIZER)
    # Continuation bytes alone, an ASCII letter, and the first half of a character that never ends.
    assert detokenizer.push([0x80] * 5 + [0x61]) == '\ufffd' * 5 + 'a'
    assert detokenizer.push([0xC3]) == ''
    assert detokenizer.close() == '\ufffd'


def test_any_bytes_read_bit_by_bit_are_the_text_of_all_of_them():
    generator = np.random.default_rng(0)
    characters = [character.encode() for character in 'aé漢😀']
    for _ in range(200):
        # Whole characters, halves of characters and stray bytes.
        pieces = [characters[i][: generator.integers(1, 5)] for i in generator.integers(0, 4, 12)]
        tokens = list(b''.join([*pieces, generator.bytes(3), characters[2]]))
        detokenizer, first = Detokenizer(TOKENIZER), 0
        while first < len(tokens):
            size = generator.integers(1, 6)
            detokenizer.push(tokens[first : first + size])
            first += size
        detokenizer.close()
        assert detokenizer.text == TOKENIZER.decode(tokens)


@pytest.mark.parametrize('block', [1, 4, 100])
def test_text_ends_at_a_stop_string_or_eos_and_never_shows_a_part_of_it(block):
    tokens = [*TOKENIZER.encode('abSTSTOPde').tolist(), TOKENIZER.eos_id, 65]
    for stop, text, finished in ((['STOP', 'zz'], 'abST', 'stop'), (['STOPX'], 'abSTSTOPde', 'eos')):
        detokenizer = Detokenizer(TOKENIZER, stop=stop)
        shown = ''
        for i in range(0, len(tokens), block):
            shown += detokenizer.push(tokens[i : i + block])
            assert text.startswith(shown)
        assert (shown + detokenizer.close(), detokenizer.finished) == (text, finished)
        assert detokenizer.push([65]) == ''
