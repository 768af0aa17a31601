"""Token by token is the same as all at once: every causal model, prompt length, row and chunk border.

On a GPU: GAU_TEST_PLATFORM=cuda python -m pytest tests/models/test_decoding.py tests/models/test_decoding_kernels.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.models import decoding
from tests.models import tiny
from tests.models.decoded import BLOCK, N, functions, staircase
from tests.numerics import float64

DECODABLE = [name for name in tiny.CAUSAL if name != 'combiner']
# The plain Transformers differ from Transformer++ in what stands around the attention only; MC-TFM++ has FLASH's state.
RELATIVES = ('transformer', 'transformer_plus', 'mc_transformer_plus_plus')
FIRST = [pytest.param(name, marks=pytest.mark.slow if name in RELATIVES else ()) for name in DECODABLE]
# States that do not grow, beside FLASH's.
RECURRENT = ('mc_transformer_plus_plus', 'performer')
# The loop differs from single steps by the chunk and by the cache; the other models have nothing of their own in it.
LOOPED = ('flash', 'flash_quad', 'transformer_plus_plus')
ABLATIONS = {
    # (Of one layer, unless layers are scanned or differ.)
    'scan, remat, heads, global': (
        'flash',
        {'layer_stack': 'scan', 'remat': 'full', 'num_heads': 2, 'branches': 'global'},
    ),
    'scan, quadratic': ('transformer_plus_plus', {'layer_stack': 'scan', 'short_convolution': 2}),
    'local, rotary bias, post norm': (
        'flash',
        {'branches': 'local', 'relative_bias': 'rotary', 'norm_placement': 'post'},
    ),
    'sum, su, no gate, temperature': (
        'flash',
        {'global_reduction': 'sum', 'normalizer': 'su', 'gate': 'none', 'temperature': 'learned'}
        | {'rope': 'local', 'key_input': 'shifted'},
    ),
    'gate, window, convolution': ('flash', {'decay_gate': 'scalar', 'local_window': 2, 'short_convolution': 3}),
    'far chunk, gate, shifted keys': ('flash', {'far_chunks': 1, 'decay_gate': 'scalar', 'key_input': 'shifted'}),
    'far chunk, scan, window': ('flash', {'far_chunks': 1, 'local_window': 2, 'layer_stack': 'scan'}),
    # Of up to four or seven, so that there is a choice; and of fewer than may be read.
    'far chunks, shifted keys': ('flash', {'far_chunks': 2, 'key_input': 'shifted'}),
    'far chunks, scan, window, local': (
        'flash',
        {'far_chunks': 3, 'local_window': 2, 'chunk_size': 3, 'branches': 'local', 'layer_stack': 'scan'},
    ),
    'far chunks, all of them': ('flash', {'far_chunks': 9, 'rope': 'local'}),
    'gate, sum, global': ('flash', {'decay_gate': 'scalar', 'global_reduction': 'sum', 'branches': 'global'}),
    'visible, laplace, no bias, sandwich norm': (
        'flash',
        {
            **{'normalizer': 'visible', 'attention_function': 'laplace', 'relative_bias': 'none'},
            **{'gamma_init': 'ones', 'norm_placement': 'sandwich', 'local_window': 2},
        },
    ),
    'reference impl, no positions': ('flash', {'impl': 'reference', 'rope': 'none', 'absolute_position': 'none'}),
    'quad, rotary bias, heads, visible': (
        'flash_quad',
        {'relative_bias': 'rotary', 'num_heads': 2, 'normalizer': 'visible', 'key_input': 'own'},
    ),
    'quad, softmax, temperature': ('flash_quad', {'attention_function': 'softmax', 'temperature': 'learned'}),
    'attention with relu^2, bias, gate, heads': (
        'transformer_plus_plus',
        {'attention_function': 'relu2', 'relative_bias': 'toeplitz', 'gate': 'silu', 'num_heads': 4},
    ),
    'mixed chunks, global': ('mc_transformer_plus_plus', {'branches': 'global', 'layer_stack': 'scan'}),
    'favor': ('performer', {'feature_map': 'favor', 'num_features': 6}),
}


def in_one_loop(name, steps, **fields):
    """Largest difference between `decoding.decode` and the full forward, rows at every place of their chunks.

    Row b has read b + 1 tokens when it is told what to read in the next `steps`, in two calls of half of them.
    """
    model, params = tiny.make(name, **fields)
    rows = np.arange(6)
    tokens_BN = tiny.tokens(len(rows), N)
    # The full forward in kernels is that of the reference (test_triton.py).
    exact, _ = tiny.make(name, **fields | ({'impl': 'reference'} if 'impl' in fields else {}))
    full_BNV = np.asarray(tiny.apply(exact, params, tokens_BN), np.float64)
    length_B = jnp.asarray(rows + 1, jnp.int32)
    found = []

    def draw(logits_BV, number):
        # As bytes: to a callback float64 would be float32.
        bytes_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint8)
        jax.debug.callback(lambda x: found.append(np.asarray(x).view(logits_BV.dtype)[..., 0]), bytes_BV, ordered=True)
        return tokens_BN[rows, length_B + number]

    prefill, _ = functions(model)
    loop = tiny.compile_fast(
        lambda params, state, logits_BV, first: decoding.decode(
            model, params, state, logits_BV, draw, first + jnp.arange(steps // 2)
        )
    )
    state = decoding.init_state(model, batch_size=len(rows), capacity=N)
    logits_BV, state = prefill(params, state, tokens_BN, length_B)
    for first in (0, steps // 2):
        tokens_NB, state, logits_BV = loop(decoding.in_compute_type(model, params), state, logits_BV, first)
        np.testing.assert_array_equal(
            tokens_NB, [tokens_BN[rows, length_B + number] for number in range(first, first + steps // 2)]
        )
    jax.effects_barrier()
    wanted = [full_BNV[rows, rows + step] for step in range(steps + 1)]
    worst = max(np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip([*found, logits_BV], wanted, strict=True))
    np.testing.assert_array_equal(state['position'], length_B + steps)
    return worst, np.abs(full_BNV).max()


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=() if name in LOOPED else pytest.mark.slow) for name in DECODABLE]
)
def test_the_loop_is_the_full_forward_across_the_borders_of_chunks(name):
    # Chunks have 5 tokens: half of the steps are four windows of four tokens, or one of eight.
    with float64():
        worst, size = in_one_loop(name, 16)
    assert size > 0.1
    assert worst < 1e-12


@pytest.mark.parametrize(
    'fields',
    [
        {'layer_stack': 'scan', 'num_heads': 2, 'branches': 'global', 'short_convolution': 3}
        | {'key_input': 'shifted'},
        {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2, 'num_layers': 1},
        {'far_chunks': 2, 'num_layers': 1},
        pytest.param({'far_chunks': 1, 'decay_gate': 'scalar', 'layer_stack': 'scan'}, marks=pytest.mark.slow),
        pytest.param(
            {'far_chunks': 3, 'local_window': 2, 'chunk_size': 3, 'branches': 'local', 'layer_stack': 'scan'},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {'decay_gate': 'scalar', 'global_reduction': 'sum', 'layer_stack': 'scan'}, marks=pytest.mark.slow
        ),
        pytest.param(
            {'local_window': 2, 'normalizer': 'visible', 'relative_bias': 'rotary'} | {'num_layers': 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {'branches': 'local', 'relative_bias': 'rotary', 'normalizer': 'visible', 'num_layers': 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {'global_reduction': 'sum', 'attention_function': 'softmax', 'num_layers': 1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_loop_of_an_ablation(fields):
    with float64():
        # Windows of five tokens, a whole chunk.
        worst, size = in_one_loop('flash', 10, **fields)
    assert size > 0.1
    assert worst < 1e-12


@pytest.mark.parametrize('name', ['flash', pytest.param('transformer_plus_plus', marks=pytest.mark.slow)])
def test_the_loop_in_bfloat16(name):
    worst, size = in_one_loop(name, 16, dtype='bfloat16', num_layers=1)
    assert size > 0.1
    assert worst < 0.05 * size


@pytest.mark.parametrize('name', FIRST)
def test_decoding_is_the_full_forward_at_every_position(name):
    with float64():
        worst, size = staircase(*tiny.make(name))
    assert size > 0.1
    assert worst < 1e-12


# Of one layer each; those of the other attentions prove less than the models themselves above.
QUICK = (
    'scan, remat, heads, global',
    'gate, window, convolution',
    'far chunk, gate, shifted keys',
    'far chunks, shifted keys',
    'gate, sum, global',
    'sum, su, no gate, temperature',
    'favor',
)
assert ABLATIONS.keys() >= set(QUICK)


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in ABLATIONS]
)
def test_every_ablation_decodes(case):
    name, fields = ABLATIONS[case]
    fields = {'num_layers': 2 if 'layer_stack' in fields else 1} | fields
    with float64():
        worst, size = staircase(*tiny.make(name, **fields))
    assert size > 0.1
    assert worst < 1e-12


# float32 takes the same way as float64 and bfloat16: only one model of each kind of state runs in CI.
IN_FLOAT32 = ('flash', 'transformer_plus_plus')
ROUNDED = [
    pytest.param(name, dtype, bound, block, marks=() if quick else pytest.mark.slow)
    for name in DECODABLE
    for dtype, bound in (('float32', 5e-6), ('bfloat16', 0.05))
    for block in (BLOCK, 1, 24)
    for quick in [block == BLOCK and (name == 'flash' or (name in IN_FLOAT32 and dtype == 'bfloat16'))]
]


@pytest.mark.parametrize(('name', 'dtype', 'bound', 'block'), ROUNDED)
def test_rounding_in_the_other_types_and_a_saved_state_goes_on_bitwise(name, dtype, bound, block, tmp_path):
    """bfloat16 has steps of 2^-8: the two ways of adding may differ by some of them in logits of size 3."""
    made = tiny.make(name, dtype=dtype, num_layers=1 if block == BLOCK else 2)
    worst, size = staircase(*made, block=block, folder=tmp_path)
    assert size > 0.1
    assert worst < bound * size


@pytest.mark.parametrize('far_chunks', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_saved_state_with_far_chunks_goes_on_bitwise(far_chunks, tmp_path):
    made = tiny.make('flash', dtype='bfloat16', num_layers=1, far_chunks=far_chunks)
    worst, size = staircase(*made, folder=tmp_path)
    assert size > 0.1
    assert worst < 0.05 * size


@pytest.mark.parametrize('name', ['flash', *(pytest.param(name, marks=pytest.mark.slow) for name in RECURRENT)])
def test_memory_of_prefill_does_not_grow_with_the_prompt(name):
    model, params = tiny.make(name, dtype='float32', num_layers=1)
    prefill = tiny.compile_fast(functools.partial(decoding.prefill, model, block=16))
    state, length_B = decoding.init_state(model, batch_size=2), jnp.ones(2, jnp.int32)

    def bytes_of(n):
        compiled = prefill.lower(params, state, jnp.zeros((2, n), jnp.int32), length_B).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = 64, 8192
    # The tokens themselves, laid out in blocks, are 4 bytes each; activations would be more than a hundred.
    assert bytes_of(long) - bytes_of(short) < 2 * 4 * 2 * (long - short)


def test_the_loop_writes_far_chunks_in_place():
    model, params = tiny.make('flash', dtype='float32', num_layers=1, far_chunks=2)
    state = decoding.init_state(model, batch_size=2, capacity=2**16)

    def loop(params, state, logits_BV):
        return decoding.decode(model, params, state, logits_BV, lambda x_BV, _: x_BV.argmax(-1), jnp.arange(8))

    logits_BV = jnp.zeros((2, tiny.VOCAB), jnp.float32)
    compiled = jax.jit(loop, donate_argnums=1).lower(params, state, logits_BV).compile()
    # A copy of keys and values would be nearly all of the state.
    assert compiled.memory_analysis().temp_size_in_bytes < decoding.state_bytes(state) / 10


@pytest.mark.parametrize('fields', [{}, pytest.param({'layer_stack': 'scan'}, marks=pytest.mark.slow)])
def test_copies_of_a_row_continue_alike(fields):
    model, params = tiny.make('flash', dtype='float32', num_layers=1, **fields)
    prefill, step = functions(model)
    tokens_BN = tiny.tokens(2, N)
    _logits_BV, state = prefill(params, decoding.init_state(model, batch_size=2), tokens_BN, jnp.array([9, 24]))
    three = decoding.map_rows(lambda x: jnp.repeat(x, 3, axis=0), state, stacked='layer_stack' in fields)
    assert np.array_equal(three['position'], [9, 9, 9, 24, 24, 24])
    assert decoding.state_bytes(three) == 3 * decoding.state_bytes(state)
    one, _ = step(params, state, jnp.array([3, 4]))
    many, _ = tiny.compile_fast(functools.partial(decoding.step, model))(params, three, jnp.array([3, 3, 5, 4, 4, 4]))
    np.testing.assert_allclose(many[jnp.array([0, 1, 3, 4, 5])], one[jnp.array([0, 0, 1, 1, 1])], atol=1e-5)
    assert np.abs(many[2] - one[0]).max() > 1e-3


def test_the_state_does_not_grow_with_the_text_unless_the_model_keeps_it():
    shapes = {}
    for name in DECODABLE:
        model, _ = tiny.make(name, dtype='bfloat16', context=64)
        sizes = [decoding.state_bytes(decoding.init_state(model, batch_size=2, capacity=m)) for m in (32, 64)]
        shapes[name] = sizes[1] / sizes[0]
    quadratic = {'flash_quad', 'transformer', 'transformer_plus', 'transformer_plus_plus'}
    assert {name for name, growth in shapes.items() if growth > 1.9} == quadratic
    assert {name for name, growth in shapes.items() if growth == 1} == set(DECODABLE) - quadratic


def test_shapes_of_flash():
    model, _ = tiny.make('flash', dtype='bfloat16')
    state = decoding.init_state(model, batch_size=3)
    found = {name: (x.shape, x.dtype.name) for name, x in state['blocks_0']['gau'].items()}
    assert found == {
        'v': ((3, 1, 5, 16), 'bfloat16'),
        'k': ((3, 1, 5, 4), 'bfloat16'),
        'k_lin': ((3, 1, 5, 4), 'bfloat16'),
        'sum': ((3, 1, 4, 16), 'float32'),
    }
    assert set(state) == {'position', 'blocks_0', 'blocks_1'}
    assert state['position'].shape == (3,)


@pytest.mark.parametrize(
    ('name', 'fields', 'capacity'),
    [
        ('transformer_plus_plus', {}, 4),
        # Whole chunks of 5.
        ('flash', {'far_chunks': 2, 'num_layers': 1}, 10),
    ],
)
def test_past_the_capacity_is_nan_and_not_text(name, fields, capacity):
    model, params = tiny.make(name, dtype='float32', **fields)
    prefill, step = functions(model)
    tokens_BN = tiny.tokens(2, capacity)
    state = decoding.init_state(model, batch_size=2, capacity=capacity)
    logits_BV, state = prefill(params, state, tokens_BN, jnp.array([capacity, capacity - 1]))
    assert np.isfinite(logits_BV).all()
    logits_BV, _ = step(params, state, jnp.array([1, 1]))
    assert np.isnan(logits_BV[0]).all()
    assert np.isfinite(logits_BV[1]).all()
