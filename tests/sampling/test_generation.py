"""How tokens are drawn, and decoding with the state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.sampling import generation
from gau.sampling.generation import SamplingParams
from tests.models import tiny
from tests.programs import report


def probabilities(sampling, p=(0.5, 0.2, 0.2, 0.1)):
    return np.asarray(jax.nn.softmax(generation.drawn_logits(jnp.log(jnp.array([p])), sampling)))[0]


@pytest.mark.parametrize(
    ('sampling', 'seed', 'message'),
    [
        (SamplingParams(float('nan')), 0, 'temperature=nan must be 0'),
        (SamplingParams(1e-40), 0, 'temperature=1e-40 must be 0'),
        (SamplingParams(float('inf')), 0, 'temperature=inf'),
        (SamplingParams(-1.0), 0, 'temperature=-1'),
        (SamplingParams(top_p=float('nan')), 0, 'top_p=nan'),
        (SamplingParams(), 2**70, f'seed={2**70} must lie in 0..2147483647'),
    ],
)
def test_what_nothing_can_be_drawn_with_is_refused(sampling, seed, message):
    with pytest.raises(UserError, match=message):
        next(generation.generate(None, None, [np.zeros(1)], max_tokens=1, sampling=sampling, seed=seed))


def test_what_may_be_drawn():
    np.testing.assert_allclose(probabilities(SamplingParams()), [0.5, 0.2, 0.2, 0.1], atol=1e-6)
    np.testing.assert_allclose(probabilities(SamplingParams(0.5)), np.array([25, 4, 4, 1]) / 34, atol=1e-6)
    np.testing.assert_allclose(probabilities(SamplingParams(top_k=1)), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(SamplingParams(top_k=9)), [0.5, 0.2, 0.2, 0.1], atol=1e-6)
    np.testing.assert_allclose(probabilities(SamplingParams(top_p=0.4)), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(SamplingParams(top_p=1e-9)), [1, 0, 0, 0])
    three = probabilities(SamplingParams(top_p=0.85), (0.5, 0.25, 0.15, 0.1))
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
    blocks = list(
        generation.generate(model, params, prompts, max_tokens=13, sampling=SamplingParams(0), seed=0, block=4)
    )
    assert [block.shape for block in blocks] == [(2, 4)] * 3 + [(2, 1)]
    written = np.concatenate(blocks, axis=1).tolist()
    assert written == [whole_prefix(model, params, prompt, 13) for prompt in prompts]


# Programs over devices are compiled; nothing in a row knows of another.
@pytest.mark.slow
def test_rows_spread_over_devices_and_layers_split_write_the_same():
    written = report('tests.sampling.on_four_devices')
    assert written['4'] == written['tensor'] == written['1']
    assert np.shape(written['4']) == (8, 9)


@pytest.mark.parametrize(('devices', 'message'), [(2, 'a batch of 3 does not divide over 2'), (4096, 'not 4096')])
def test_rows_that_cannot_be_spread_are_refused(devices, message, monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 2)
    model, params = tiny.make('flash', dtype='float32', num_layers=1)
    with pytest.raises(UserError, match=message):
        generation.prefill(model, params, [np.array([1])] * 3, max_tokens=1, devices=devices)


def test_the_seed_decides_and_rows_do_not_depend_on_each_other():
    model, params = tiny.make('flash', dtype='float32', num_layers=1)
    draw = functools.partial(
        generation.sample, model, params, np.array([3, 4]), bos_id=0, max_tokens=40, temperature=1.0
    )
    three = draw(seed=1, num=3)
    assert three.shape == (3, 40)
    assert np.array_equal(three, draw(seed=1, num=3))
    assert np.array_equal(three[:1], draw(seed=1))
    assert not np.array_equal(three, draw(seed=2, num=3))
    assert not np.array_equal(three[0], three[1])
