"""Decoding in kernels: tokens in a loop, prompts in blocks, and a state of quadratic attention, as the full forward."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gau.layers import decode_unit, quadratic
from gau.models import decoding
from gau.models.target import Implementation
from tests.models import tiny
from tests.models.decoded import BLOCK, N, functions
from tests.models.test_decoding import in_one_loop
from tests.numerics import float64

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    'fields',
    [
        pytest.param(
            {'normalizer': 'su', 'global_reduction': 'sum', 'relative_bias': 'rotary', 'key_input': 'shifted'},
            marks=pytest.mark.slow,
        ),
        {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2},
        {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2, 'far_chunks': 2},
        # Of more than there are, and where some are left out twice; and an odd width of a chunk that no block divides.
        pytest.param({'far_chunks': 9, 'query_key_dim': 6, 'expansion_factor': 2.5}, marks=SLOW),
        pytest.param({'far_chunks': 3, 'chunk_size': 3, 'num_layers': 2, 'relative_bias': 'rotary'}, marks=SLOW),
        pytest.param({'num_layers': 2, 'query_key_dim': 6, 'expansion_factor': 2.5}, marks=pytest.mark.slow),
        pytest.param(
            {
                'normalizer': 'visible',
                'relative_bias': 'none',
                'gamma_init': 'ones',
                'rope': 'none',
                'query_key_dim': 3,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_loop_in_kernels(fields, monkeypatch):
    pytest.importorskip('triton')
    calls = []
    kernels = decode_unit.decode_gated_chunks
    monkeypatch.setattr(decode_unit, 'decode_gated_chunks', lambda *x, **y: calls.append(1) or kernels(*x, **y))
    worst, size = in_one_loop('flash', 10, impl='triton', dtype='float32', **{'num_layers': 1} | fields)
    assert calls
    assert size > 0.1
    assert worst < 1e-5 * size


def far_model_and_loop(tokens_BN, length_B, numbers):
    """A model in kernels, its parameters, and a loop that reads these tokens of a text, whatever the logits say."""
    pytest.importorskip('triton')
    model, params = tiny.make('flash', impl='triton', dtype='float32', num_layers=1, far_chunks=2)
    rows = np.arange(len(tokens_BN))

    def loop(params, state, logits_BV):
        def draw(_, number):
            return tokens_BN[rows, length_B + number]

        return decoding.decode(model, params, state, logits_BV, draw, jnp.arange(numbers))[1:]

    return model, params, tiny.compile_fast(loop)


def test_a_state_of_far_chunks_in_kernels_goes_on_in_steps():
    """It ends in every place of a chunk; steps are not in kernels."""
    rows, tokens_BN, length_B = np.arange(6), tiny.tokens(6, N), jnp.arange(6, 12)
    model, params, loop = far_model_and_loop(tokens_BN, length_B, 4)
    exact, _ = tiny.make('flash', impl='reference', dtype='float32', num_layers=1, far_chunks=2)
    full_BNV = np.asarray(tiny.apply(exact, params, tokens_BN))
    prefill, step = functions(model)
    logits_BV, state = prefill(params, decoding.init_state(model, batch_size=6, capacity=N), tokens_BN, length_B)
    state, logits_BV = loop(params, state, logits_BV)
    for more in range(4, 13):
        difference = logits_BV - full_BNV[rows, length_B - 1 + more]
        assert np.abs(difference).max() < 1e-5 * np.abs(full_BNV).max(), more
        logits_BV, state = step(params, state, tokens_BN[rows, length_B + more])


@pytest.mark.parametrize('lengths', [[10, 9], [10]])
def test_past_the_capacity_of_far_chunks_kernels_give_nan(lengths):
    tokens_BN, length_B = tiny.tokens(len(lengths), 12), jnp.array(lengths)
    model, params, loop = far_model_and_loop(tokens_BN, length_B, 1)
    state = decoding.init_state(model, batch_size=len(lengths), capacity=10)
    logits_BV, state = functions(model)[0](params, state, tokens_BN[:, :10], length_B)
    old = state['blocks_0']['gau']
    state, logits_BV = loop(params, state, logits_BV)
    assert np.isnan(logits_BV[0]).all()
    assert np.isfinite(logits_BV[1:]).all()
    # Nothing is written in the places of others.
    for name in ('far_k', 'far_v'):
        np.testing.assert_array_equal(state['blocks_0']['gau'][name][0], old[name][0])


@pytest.mark.parametrize(
    'fields', [{}, pytest.param({'normalizer': 'su', 'relative_bias': 'rotary'}, marks=pytest.mark.slow)]
)
def test_the_loop_of_quadratic_attention_in_kernels(fields):
    pytest.importorskip('triton')
    worst, size = in_one_loop('flash_quad', 10, impl='triton', dtype='float32', num_layers=1, **fields)
    assert size > 0.1
    assert worst < 1e-5 * size


@pytest.mark.parametrize(
    ('name', 'fields', 'readers'),
    [
        ('flash', {'num_layers': 1}, {'short'}),
        ('flash', {'num_layers': 1}, set()),
        ('flash_quad', {'num_layers': 1}, set()),
        ('flash_quad', {'attention_function': 'softmax', 'num_layers': 1}, set()),
        ('flash', {'attention_function': 'softmax', 'num_layers': 1}, set()),
        ('flash', {'normalizer': 'su', 'relative_bias': 'none', 'gamma_init': 'ones'}, {'short'}),
        ('flash', {'key_input': 'shifted', 'decay_gate': 'scalar'}, {'short'}),
        ('flash', {'decay_gate': 'scalar', 'num_layers': 1}, {'long'}),
        # With a window of two chunks those of short prompts begin a sequence, those of long ones go on.
        ('flash', {'key_input': 'shifted', 'decay_gate': 'scalar', 'local_window': 2}, {'short', 'long'}),
        ('flash', {'local_window': 2, 'num_layers': 1}, {'long'}),
        ('flash', {'decay_gate': 'scalar', 'global_reduction': 'sum', 'num_layers': 1}, {'long'}),
        # Prompts of far chunks have none, and leave none to the branches beside them; their tokens have.
        ('flash', {'far_chunks': 2, 'decay_gate': 'scalar', 'num_layers': 1}, set()),
        # Layers that are scanned have none of the kernels that write in place.
        ('flash', {'layer_stack': 'scan', 'key_input': 'shifted'}, set()),
    ],
)
# Blocks with a carried state are proven in tests/ops/kernels: test_prefill_chunks.py, test_decode_chunks.py and
# test_gated_chunks.py.
@pytest.mark.slow
def test_prompts_in_kernels(name, fields, readers, monkeypatch):
    """Prompts at once and in two parts, of which the second begins anywhere in a chunk; short ones, and others."""
    pytest.importorskip('triton')
    if 'short' not in readers and 'layer_stack' not in fields:
        monkeypatch.setattr(decoding, 'SHORT_PROMPT_TOKENS', 0)
    found, kernels = set(), decode_unit.prefill_gated_chunks

    def read(*x, position, **y):
        found.add(position.reader)
        return kernels(*x, position=position, **y)

    monkeypatch.setattr(decode_unit, 'prefill_gated_chunks', read)
    model, params = tiny.make(name, impl='triton', dtype='float32', **fields)
    exact, _ = tiny.make(name, impl='reference', **fields)
    length_B, first_B = jnp.array([1, 4, 10, 21, 22]), jnp.array([0, 1, 5, 8, 11])
    rows, last = np.arange(5), np.asarray(length_B) - 1
    tokens_BN = tiny.tokens(5, N)
    with float64():
        full_BNV = np.asarray(tiny.apply(exact, params, tokens_BN))
    prefill = functools.partial(decoding.prefill, model, block=BLOCK)
    more = {'block': None} if 'local_window' in fields and 'short' in readers else {}
    whole, step = tiny.compile_fast(functools.partial(prefill, fresh=True, **more)), functions(model)[1]
    rest_BN = tokens_BN[rows[:, None], np.minimum(first_B[:, None] + np.arange(N), N - 1)]
    empty = decoding.init_state(model, batch_size=5, capacity=N)
    _, state = whole(params, empty, tokens_BN, first_B)
    ways = {
        'at once': whole(params, empty, tokens_BN, length_B),
        'in two parts': tiny.compile_fast(prefill)(params, state, rest_BN, length_B - first_B),
    }
    for way, (logits_BV, state) in ways.items():
        assert np.array_equal(state['position'], length_B)
        assert np.abs(logits_BV - full_BNV[rows, last]).max() < 1e-5 * np.abs(full_BNV).max(), way
        for more in (1, 2):
            logits_BV, state = step(params, state, tokens_BN[rows, last + more])
            difference = logits_BV - full_BNV[rows, last + more]
            assert np.abs(difference).max() < 1e-5 * np.abs(full_BNV).max(), (way, more)
    assert found == readers


def test_a_transformer_built_for_cudnn(monkeypatch):
    """A fresh prompt is one block of cuDNN's causal attention (here: in XLA), tokens look back in a kernel."""
    pytest.importorskip('triton')
    monkeypatch.setattr(
        quadratic, 'cudnn_attention', functools.partial(quadratic.cudnn_attention, implementation='xla')
    )
    exact, params = tiny.make('transformer_plus_plus', dtype='float32', num_layers=1)
    model = exact.clone(implementation=Implementation('cudnn'))
    length_B, rows = jnp.array([1, 10, 21]), np.arange(3)
    tokens_BN = tiny.tokens(3, N)
    full_BNV = np.asarray(tiny.apply(exact, params, tokens_BN))
    state = decoding.init_state(model, batch_size=3, capacity=N - 1)
    prefill = tiny.compile_fast(functools.partial(decoding.prefill, model, fresh=True))
    step = tiny.compile_fast(functools.partial(decoding.step, model))
    logits_BV, state = prefill(params, state, tokens_BN, length_B)
    for more in range(3):
        assert np.abs(logits_BV - full_BNV[rows, length_B - 1 + more]).max() < 1e-5 * np.abs(full_BNV).max()
        logits_BV, state = step(params, state, tokens_BN[rows, length_B + more])
    # The last row was past the capacity.
    assert np.isnan(logits_BV).all(axis=1).tolist() == [False, False, True]
