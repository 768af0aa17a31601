"""Decoding in kernels: tokens in a loop, prompts in blocks, and a state of quadratic attention, as the full forward."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from gau.layers import decode_unit, quadratic
from gau.models import decoding
from gau.models.target import Implementation
from tests.models import tiny
from tests.models.test_decoding import BLOCK, N, functions, in_one_loop
from tests.numerics import float64


@pytest.mark.parametrize(
    'fields',
    [
        pytest.param(
            {'normalizer': 'su', 'global_reduction': 'sum', 'global_decay': 0.5, 'relative_bias': 'rotary'}
            | {'key_input': 'shifted'},
            marks=pytest.mark.slow,
        ),
        {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2},
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
        ('flash', {'global_decay': 0.7, 'num_layers': 1}, {'short'}),
        ('flash', {'global_decay': 0.7, 'num_layers': 1}, set()),
        ('flash_quad', {'num_layers': 1}, set()),
        ('flash_quad', {'attention_function': 'softmax', 'num_layers': 1}, set()),
        ('flash', {'attention_function': 'softmax', 'num_layers': 1}, set()),
        ('flash', {'normalizer': 'su', 'relative_bias': 'none', 'gamma_init': 'ones'}, {'short'}),
        ('flash', {'key_input': 'shifted', 'decay_gate': 'scalar'}, {'short'}),
        ('flash', {'decay_gate': 'scalar', 'num_layers': 1}, {'long'}),
        # With a window of two chunks those of short prompts begin a sequence, those of long ones go on.
        ('flash', {'key_input': 'shifted', 'decay_gate': 'scalar', 'local_window': 2}, {'short', 'long'}),
        ('flash', {'local_window': 2, 'num_layers': 1}, {'long'}),
        ('flash', {'decay_gate': 'keys', 'global_reduction': 'sum', 'num_layers': 1}, set()),
        # Far chunks have none, and leave none to the branches beside them.
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
