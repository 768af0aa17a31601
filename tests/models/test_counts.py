import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gau.models import counts, decoding
from gau.models.architectures import ARCHITECTURES, SIZES
from gau.models.config import default_config, resolve
from gau.models.registry import build
from tests.models.tiny import CASES, VOCAB, make, tiny_config

VOCABULARY = 32_000


def named(name, size, objective='lm', context=1024, **fields):
    config = default_config()
    config.name, config.size = name, size
    config.update(fields)
    return resolve(config, causal=objective == 'lm', context=context)


def built(config, causal=True, vocab_size=VOCABULARY):
    model = build(config, vocab_size=vocab_size, causal=causal)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))


@pytest.mark.parametrize('size', sorted(SIZES))
def test_the_table_of_sizes_is_true(size):
    for name, number in SIZES[size].parameters.items():
        config = named(name, size)
        assert counts.parameters(config, vocab_size=VOCABULARY) == number
        assert built(named(name, size, layer_stack='scan')) == number


def test_base_is_the_papers_size():
    assert abs(SIZES['base'].parameters['flash'] / 112.0e6 - 1) < 0.01
    assert abs(SIZES['base'].parameters['transformer_plus_plus'] / 109.5e6 - 1) < 0.01


OPTIONS = [
    {'name': 'flash', 'num_heads': 4, 'short_convolution': 3},
    {'name': 'flash', 'gate': 'none', 'norm': 'layer_norm', 'norm_placement': 'post', 'output_layer': 'own'},
    {'name': 'flash', 'branches': 'local', 'temperature': 'learned', 'norm_placement': 'sandwich'},
    {'name': 'flash', 'branches': 'global', 'absolute_position': 'none', 'key_input': 'own'},
    {'name': 'flash_quad', 'relative_bias': 'rotary', 'expansion_factor': 3.0, 'key_input': 'shifted'},
    {'name': 'flash_quad', 'relative_bias': 'none', 'num_heads': 4},
    {
        'name': 'transformer',
        'gate': 'silu',
        'head_dim': 6,
        'short_convolution': 2,
        'norm': 'rms_norm',
        'norm_placement': 'sandwich',
    },
    {'name': 'transformer', 'relative_bias': 'toeplitz', 'temperature': 'learned'},
    {'name': 'mc_transformer_plus_plus', 'branches': 'local', 'feed_forward': 'swiglu'},
    {'name': 'flash', 'decay_gate': 'scalar'},
    {'name': 'flash', 'decay_gate': 'scalar', 'local_window': 2, 'relative_bias': 'toeplitz'},
    {'name': 'flash', 'far_chunks': 2, 'branches': 'local'},
    {'name': 'performer', 'feature_map': 'favor', 'num_heads': 4},
]


def test_parameters_are_those_of_the_built_models():
    cases = [{'name': name, 'objective': objective} for name, objective in CASES]
    for fields in cases + OPTIONS:
        _, params = make(**fields)
        count = counts.parameters(tiny_config(**fields), vocab_size=VOCAB)
        assert count == sum(leaf.size for leaf in jax.tree.leaves(params)), fields


def test_states_are_those_of_the_built_models():
    cases = [{'name': name} for name, objective in CASES if objective == 'lm' and name != 'combiner']
    for fields in cases + OPTIONS + [{'name': 'flash', 'far_chunks': 1, 'local_window': 2, 'key_input': 'shifted'}]:
        # In the type that tells sums from keys and values; a capacity of no whole chunks.
        model = build(tiny_config(**fields, dtype='bfloat16'), vocab_size=VOCAB, causal=True)
        state = jax.eval_shape(functools.partial(decoding.init_state, model, batch_size=1, capacity=17))
        assert counts.state_bytes(model.config, context=17) == decoding.state_bytes(state), fields
    assert counts.state_bytes(tiny_config('combiner'), context=17) is None


def test_far_chunks_keep_78_kib_a_token_and_one_of_them_none():
    short, long = 8192, 16384
    sizes = [
        [counts.state_bytes(named('flash', 'base', context=short, far_chunks=far), context=n) for n in (short, long)]
        for far in (4, 1, 0)
    ]
    # Keys and values; and a mean key for each chunk of 256.
    assert (sizes[0][1] - sizes[0][0]) / (long - short) == 24 * (2 * (128 + 1536) + 4 * 128 / 256)
    assert sizes[1][0] == sizes[1][1] == sizes[2][0] + 24 * 2 * 256 * (2 * 128 + 1536)


@pytest.mark.parametrize('name', sorted(ARCHITECTURES))
def test_flops_are_those_xla_counts(name):
    # Bidirectional, so that the reference computes exactly what is counted; wide, so that matrix products dominate.
    # Chunked attention is compared in its chunked form: the reference is quadratic.
    chunked = name in ('flash', 'mc_transformer_plus_plus', 'performer', 'linformer')
    fields = {'impl': 'xla' if chunked else 'reference', 'dtype': 'float32', 'num_layers': 1, 'model_dim': 256}
    if 'chunk_size' in ARCHITECTURES[name].fields:
        fields['chunk_size'] = 64
    context, vocab_size = 256, 512
    config = named(name, 'tiny', 'mlm', context, **fields)
    model = build(config, vocab_size=vocab_size, causal=False)
    tokens = jax.ShapeDtypeStruct((1, context), jnp.int32)
    variables = jax.eval_shape(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32))), jax.random.key(0))
    analysis = jax.jit(model.apply).lower(variables, tokens).cost_analysis()
    expected = counts.flops_per_token(config, context=context, vocab_size=vocab_size, causal=False)
    # XLA also counts what is not a matrix product: norms, activations, positions.
    assert 1 <= analysis['flops'] / context / expected < 1.12


def test_causal_attention_counts_half_and_chunks_are_flat():
    options = {'vocab_size': VOCABULARY}
    for name in ('flash_quad', 'transformer_plus_plus'):
        config = named(name, 'base')
        whole, half = (counts.flops_per_token(config, context=4096, causal=c, **options) for c in (False, True))
        nothing = counts.flops_per_token(config, context=1, causal=False, **options)
        assert abs((half - nothing) / (whole - nothing) - 0.5) < 1e-3
    flash = named('flash', 'base')
    short, long = (counts.flops_per_token(flash, context=n, causal=True, **options) for n in (512, 65536))
    assert short == long


def test_activation_memory():
    options = {'context': 1024, 'vocab_size': VOCABULARY, 'causal': True}
    for name, objective in CASES:
        config = named(name, 'small', objective)
        kept = counts.activation_bytes_per_token(config, **options)
        assert kept > config.num_layers * config.model_dim * 2
        remat = counts.activation_bytes_per_token(named(name, 'small', objective, remat='full'), **options)
        assert remat < kept / 2

    long = {'context': 8192, 'vocab_size': 64}
    # The relative bias is a whole matrix, however the scores are computed.
    configs = [named('flash_quad', 'small', context=8192, relative_bias=bias) for bias in ('rotary', 'none')]
    with_bias, without = (dict(counts.table(config, causal=True, **long))['layer 0'][2] for config in configs)
    assert with_bias - without == 4 * 8192

    # What XLA keeps for the backward pass of one layer more, against the closed form.
    def bytes_of(layers):
        config = named('flash', 'tiny', context=256, num_layers=layers, dtype='float32', chunk_size=64)
        model = build(config, vocab_size=64, causal=True)
        tokens = jnp.zeros((4, 256), jnp.int32)
        params = jax.eval_shape(lambda key: nn.unbox(model.init(key, tokens[:1, :8])), jax.random.key(0))

        def residuals(variables):
            return jax.vjp(lambda v: model.apply(v, tokens, method='hidden'), variables)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
        own = sum(x.size for x in jax.tree.leaves(params))
        return sum(x.size * x.dtype.itemsize for x in leaves) - 4 * own, config

    (two, config), (one, _) = bytes_of(2), bytes_of(1)
    layer = dict(counts.table(config, context=256, vocab_size=64, causal=True))['layer 0'].activation_bytes
    assert 0.5 < (two - one) / (4 * 256) / layer < 2
