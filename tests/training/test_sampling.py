"""Drawing tokens, turning them into text bit by bit, and sampling with the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.data.tokenizers import load
from gau.training import sampling
from gau.training.sampling import Drawing
from gau.training.text_stream import TextStream
from tests.models import tiny


def probabilities(drawing, p=(0.5, 0.2, 0.2, 0.1)):
    return np.asarray(jax.nn.softmax(sampling.drawn_logits(jnp.log(jnp.array([p])), drawing)))[0]


def test_what_may_be_drawn():
    np.testing.assert_allclose(probabilities(Drawing()), [0.5, 0.2, 0.2, 0.1], atol=1e-6)
    np.testing.assert_allclose(probabilities(Drawing(0.5)), np.array([25, 4, 4, 1]) / 34, atol=1e-6)
    np.testing.assert_allclose(probabilities(Drawing(top_k=1)), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(Drawing(top_k=9)), [0.5, 0.2, 0.2, 0.1], atol=1e-6)
    np.testing.assert_allclose(probabilities(Drawing(top_p=0.4)), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(Drawing(top_p=1e-9)), [1, 0, 0, 0])
    three = probabilities(Drawing(top_p=0.85), (0.5, 0.25, 0.15, 0.1))
    np.testing.assert_allclose(three, np.array([10, 5, 3, 0]) / 18, atol=1e-6)


def whole_prefix(model, params, prompt, steps):
    """The likeliest continuation by running the model over the whole text for each token."""
    text = list(prompt)
    for _ in range(steps):
        padded = jnp.asarray([text + [0] * (tiny.CONTEXT - len(text))])
        ids = jnp.asarray([[1] * len(text) + [0] * (tiny.CONTEXT - len(text))])
        text.append(int(jnp.argmax(tiny.apply(model, params, padded, ids)[0, len(text) - 1])))
    return text[len(prompt) :]


@pytest.mark.parametrize('name', ['flash', 'transformer_plus_plus'])
def test_greedy_is_the_likeliest_token_after_the_whole_prefix(name):
    model, params = tiny.make(name, dtype='float32')
    prompts = [np.array([1, 2, 3, 4, 5, 6, 7], np.int32), np.array([9], np.int32)]
    blocks = list(sampling.generate(model, params, prompts, max_tokens=13, drawing=Drawing(0), seed=0, block=4))
    assert [block.shape for block in blocks] == [(2, 4)] * 3 + [(2, 1)]
    written = np.concatenate(blocks, axis=1).tolist()
    assert written == [whole_prefix(model, params, prompt, 13) for prompt in prompts]


def test_the_seed_decides_and_rows_do_not_depend_on_each_other():
    model, params = tiny.make('flash', dtype='float32', num_layers=1)
    draw = functools.partial(sampling.sample, model, params, np.array([3, 4]), bos_id=0, max_tokens=40, temperature=1.0)
    three = draw(seed=1, num=3)
    assert three.shape == (3, 40)
    assert np.array_equal(three, draw(seed=1, num=3))
    assert np.array_equal(three[:1], draw(seed=1))
    assert not np.array_equal(three, draw(seed=2, num=3))
    assert not np.array_equal(three[0], three[1])


TOKENIZER = load('bytes')
TEXT = 'Zoë — 漢字 😀 “x”, end'


@pytest.mark.parametrize('block', [1, 2, 3, 7, 100])
def test_text_comes_in_whole_characters_whatever_the_blocks(block):
    tokens = TOKENIZER.encode(TEXT)
    stream = TextStream(TOKENIZER, before=TOKENIZER.encode('é'))
    parts = [stream.push(tokens[i : i + block]) for i in range(0, len(tokens), block)]
    assert '\ufffd' not in ''.join(parts)
    assert ''.join(parts) + stream.close() == TEXT == stream.text
    assert (stream.tokens, stream.finished) == (len(tokens), None)


def test_bytes_that_are_no_text_are_not_waited_for():
    stream = TextStream(TOKENIZER)
    # Continuation bytes alone, an ASCII letter, and the first half of a character that never ends.
    assert stream.push([0x80] * 5 + [0x61]) == '\ufffd' * 5 + 'a'
    assert stream.push([0xC3]) == ''
    assert stream.close() == '\ufffd'


def test_any_bytes_read_bit_by_bit_are_the_text_of_all_of_them():
    generator = np.random.default_rng(0)
    characters = [character.encode() for character in 'aé漢😀']
    for _ in range(200):
        # Whole characters, halves of characters and stray bytes.
        pieces = [characters[i][: generator.integers(1, 5)] for i in generator.integers(0, 4, 12)]
        tokens = list(b''.join([*pieces, generator.bytes(3), characters[2]]))
        stream, first = TextStream(TOKENIZER), 0
        while first < len(tokens):
            size = generator.integers(1, 6)
            stream.push(tokens[first : first + size])
            first += size
        stream.close()
        assert stream.text == TOKENIZER.decode(tokens)


@pytest.mark.parametrize('block', [1, 4, 100])
def test_text_ends_at_a_stop_string_or_eos_and_never_shows_a_part_of_it(block):
    tokens = [*TOKENIZER.encode('abSTSTOPde').tolist(), TOKENIZER.eos_id, 65]
    for stop, text, finished in ((['STOP', 'zz'], 'abST', 'stop'), (['STOPX'], 'abSTSTOPde', 'eos')):
        stream = TextStream(TOKENIZER, stop=stop)
        shown = ''
        for i in range(0, len(tokens), block):
            shown += stream.push(tokens[i : i + block])
            assert text.startswith(shown)
        assert (shown + stream.close(), stream.finished) == (text, finished)
        assert stream.push([65]) == ''
