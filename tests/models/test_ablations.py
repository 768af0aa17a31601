"""Every ablation changes the computation: an option that is ignored fails here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.layers.common import TokenInfo
from gau.layers.gated_attention_unit import GatedAttentionUnit
from gau.layers.quadratic import QuadraticCore
from gau.models.architectures import ARCHITECTURES
from gau.models.config import declared_fields
from gau.ops.positions import rope_table
from gau.ops.scores import Scoring
from tests.models.tiny import CONTEXT, VOCAB, apply, make, tiny_config, tokens
from tests.numerics import max_error, normal, random_like

GAU_OPTIONS = [
    *({'attention_function': name} for name in ('softmax', 'softmax_plus', 'laplace', 'softplus2', 'smooth_relu2')),
    *({'normalizer': name} for name in ('visible', 'su')),
    {'normalizer_length': 64, 'normalizer': 'fixed'},
    {'num_heads': 4},
    {'temperature': 'learned'},
    {'gate': 'none'},
    {'relative_bias': 'rotary'},
    {'relative_bias': 'none'},
    {'rope': 'none'},
    {'absolute_position': 'none', 'output_layer': 'own'},
    {'norm': 'layer_norm'},
    {'norm': 'rms_norm'},
    {'norm_placement': 'post'},
    {'norm_placement': 'sandwich'},
    {'expansion_factor': 3.0},
    {'query_key_dim': 6},
    {'short_convolution': 3},
    {'key_input': 'shifted'},
    {'key_input': 'own'},
]
CHUNK_OPTIONS = [
    {'branches': 'local'},
    {'branches': 'global'},
    {'global_reduction': 'sum'},
    {'chunk_size': 7},
]
# Of causal FLASH alone.
STATE_OPTIONS = [
    {'rope': 'local'},
    {'decay_gate': 'scalar'},
    {'decay_gate': 'scalar', 'local_window': 2},
    {'far_chunks': 2},
]
ATTENTION_OPTIONS = [
    {'attention_function': 'relu2'},
    {'num_heads': 1},
    {'gate': 'silu'},
    {'head_dim': 6},
    {'temperature': 'learned'},
    {'relative_bias': 'toeplitz'},
    {'relative_bias': 'rotary'},
    {'feed_forward': 'gelu'},
    {'feed_forward': 'swiglu'},
    {'feed_forward_dim': 10},
    {'rope': 'none'},
    {'norm': 'scale_norm'},
    {'norm_placement': 'post'},
    {'norm_placement': 'sandwich'},
    {'short_convolution': 2},
]
OPTIONS = [
    *(('flash_quad', option) for option in [*GAU_OPTIONS, {'normalizer': 'paper'}]),
    *(('flash', option) for option in [*GAU_OPTIONS[:2], *GAU_OPTIONS[4:11], *CHUNK_OPTIONS, *STATE_OPTIONS]),
    *(('transformer_plus_plus', option) for option in ATTENTION_OPTIONS),
    *(('mc_transformer_plus_plus', option) for option in [*CHUNK_OPTIONS, {'relative_bias': 'toeplitz'}]),
    ('performer', {'feature_map': 'favor', 'num_features': 8}),
    ('performer', {'gate': 'silu'}),
    ('combiner', {'chunk_size': 7}),
    ('linformer', {'projection_rank': 4}),
]

# What changes the start of parameters alone, or how and where the same is computed.
UNTRIED = {'dtype', 'layer_stack', 'remat', 'impl', 'gamma_init', 'relative_bias_init'}


_made = functools.cache(make)


def shared(own, others):
    """`own` with every leaf that `others` has in the same shape taken from there."""
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(others)}

    def pick(path, leaf):
        other = flat.get(jax.tree_util.keystr(path))
        return other if other is not None and other.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(pick, own)


@pytest.mark.parametrize(('name', 'option'), OPTIONS, ids=str)
def test_the_option_changes_the_computation(name, option):
    # Compared with the default at the same parameters, as far as they have the same shape.
    objective = 'mlm' if ARCHITECTURES[name].not_causal else 'lm'
    _, base_params = (base := _made(name, objective, num_layers=1))
    expected = apply(*base, tokens(1))
    model, params = make(name, objective, **option, num_layers=1)
    logits = apply(model, shared(params, base_params), tokens(1))
    assert np.isfinite(logits).all()
    assert logits.shape == (1, CONTEXT, VOCAB)
    assert max_error(logits, expected) > 1e-5


def test_every_choice_of_the_model_is_tried_above():
    # Tried means: on a model whose default it is not. Exempt is only what is the default wherever the field applies.
    bases = {name: tiny_config(name, 'mlm' if ARCHITECTURES[name].not_causal else 'lm') for name, _ in OPTIONS}
    choices = {name: field.choices for name, field in declared_fields().items() if field.choices}
    for field in set(choices) - UNTRIED:
        tried = {option[field] for name, option in OPTIONS if field in option and option[field] != bases[name][field]}
        defaults = {base[field] for base in bases.values()} - {None}
        required = set(choices[field]) - (defaults if len(defaults) == 1 else set())
        assert required <= tried, field


def test_a_sandwich_norm_takes_the_size_of_what_a_layer_adds():
    for placement, same in (('sandwich', True), ('pre', False)):
        model, params = make('flash', norm_placement=placement, num_layers=1)
        block = params['blocks_0']
        louder = {**block, 'gau': {**block['gau'], 'out': jax.tree.map(lambda x: 100 * x, block['gau']['out'])}}
        logits, expected = (apply(model, {**params, 'blocks_0': own}, tokens(1)) for own in (louder, block))
        assert (max_error(logits, expected) < 1e-3) == same


def output_at_start(relative_bias, gamma_init):
    """Largest output of a causal GAU of the base size, at its initial parameters, on N(0, 1) inputs."""
    positions = jnp.arange(64)[None]
    info = TokenInfo(None, positions, {128: rope_table(positions, 128)})
    scoring = Scoring('relu2', 'fixed', 512)
    core = QuadraticCore(True, 'xla', 'float32', scoring=scoring, relative_bias=relative_bias)
    unit = GatedAttentionUnit(core, 1536, 128, gamma_init=gamma_init)
    x = normal(0, 1, 64, 768).astype(jnp.float32)
    return jnp.abs(jax.jit(lambda x: unit.init_with_output(jax.random.key(0), x, info)[0])(x)).max()


def test_gamma_starts_so_that_the_layer_lives():
    # Trap 2: what the combination does that `resolve` refuses, and what its default does.
    assert output_at_start(relative_bias='none', gamma_init='normal') < 1e-10
    assert output_at_start(relative_bias='none', gamma_init='ones') > 1e-5
    assert output_at_start(relative_bias='toeplitz', gamma_init='normal') > 1e-5
    for fields in ({'relative_bias': 'none'}, {}):
        assert tiny_config('flash_quad', **fields).gamma_init == ('ones' if fields else 'normal')


def test_one_head_is_the_plain_unit():
    plain = make('flash', num_layers=1)
    heads = make('flash', num_layers=1, num_heads=1)
    np.testing.assert_array_equal(apply(*plain, tokens(1)), apply(*heads, tokens(1)))
    # Two heads with the same gamma, beta and bias are one head with V and U put back together.
    model, params = make('flash', num_layers=1, num_heads=2)
    gau = plain[1]['blocks_0']['gau']
    doubled = {
        'query_key': jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), gau['query_key']),
        'relative_bias': jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), gau['relative_bias']),
    }
    params = plain[1] | {'blocks_0': plain[1]['blocks_0'] | {'gau': gau | doubled}}
    assert max_error(apply(model, params, tokens(1)), apply(*plain, tokens(1))) < 1e-12


def test_random_parameters_matter():
    # What the other tests stand on: with parameters drawn like this, q and k reach the output (trap 2).
    model, params = make('flash', num_layers=1)
    redrawn = random_like(params, 1)
    gau = params['blocks_0']['gau'] | {'z': redrawn['blocks_0']['gau']['z']}
    changed = params | {'blocks_0': params['blocks_0'] | {'gau': gau}}
    assert max_error(apply(model, changed, tokens(1)), apply(model, params, tokens(1))) > 1e-3


@pytest.mark.parametrize(('name', 'objective', 'message'), [
    ('flash_quad', 'lm', 'a relative bias of 24 positions cannot serve 25'),
    ('linformer', 'mlm', 'projects up to 24 tokens'),
])  # fmt: skip
def test_a_longer_sequence_than_the_parameters_serve_is_refused(name, objective, message):
    model, params = make(name, objective, num_layers=1)
    with pytest.raises(UserError, match=message):
        apply(model, params, tokens(1, 25))
