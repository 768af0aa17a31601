"""The unit of FLASH-Quad and of FLASH against the NumPy oracle, with the identities of docs/paper.md section 1."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.layers.common import TokenInfo
from gau.layers.far_chunks import FarChunksCore
from gau.layers.gated_attention_unit import GatedAttentionUnit, ScaleOffset
from gau.layers.mixed_chunk import MixedChunkCore
from gau.layers.quadratic import QuadraticCore
from gau.layers.short_convolution import KeyShift
from gau.ops.positions import rope_table
from gau.ops.scores import Scoring
from tests.numerics import LAYOUTS, finite_difference, max_error, normal, random_like
from tests.ops import oracle

N, D, E, S, C = 24, 6, 8, 4, 5
POSITIONS = np.arange(N) % 17


def unit(gate='silu', core=QuadraticCore, key_input='shared', **fields):
    defaults = {'causal': True, 'impl': 'xla', 'dtype': 'float64', 'width': S}
    defaults |= {'relative_bias': 'toeplitz', 'relative_bias_length': N}
    own = {'expanded_dim': E, 'query_key_dim': S, 'gate': gate, 'key_input': key_input, 'dtype': 'float64'}
    return GatedAttentionUnit(core(**(defaults | fields)), **own)


def info(ids=None):
    positions = jnp.asarray(POSITIONS)[None]
    table = {S: rope_table(positions, S, dtype=jnp.float64)}
    return TokenInfo(None if ids is None else jnp.asarray([ids]), positions, table)


def apply(module, params, x, tokens):
    return module.apply({'params': params}, x, tokens)


def parameters(module, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, N, D)), info())['params']
    return random_like(shapes, seed, scale=0.5)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


CHUNKS = {'core': MixedChunkCore, 'chunk_size': C, 'relative_bias_length': C}
ROTARY = {'scoring': Scoring('relu2', 'fixed', 9), 'relative_bias': 'rotary'}
SOFTMAX_SUM = CHUNKS | {'scoring': Scoring('softmax', None), 'global_reduction': 'sum'}
FORMS = {
    'quad': ({'scoring': Scoring('relu2', 'paper')}, {}),
    'quad, rotary bias': (ROTARY, {'normalizer': 'fixed', 'fixed_length': 9}),
    'flash': (CHUNKS, {'chunk': C}),
    'flash, softmax, sum': (SOFTMAX_SUM, {'chunk': C, 'function': 'softmax', 'reduction': 'sum'}),
}


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('fields', 'options'), FORMS.values(), ids=FORMS)
def test_values_are_the_formula(fields, options, causal):
    module = unit(causal=causal, **fields)
    params, x = parameters(module), normal(1, 1, N, D)
    for ids in (None, LAYOUTS['packed']):
        y = jax.jit(functools.partial(apply, module))(params, x, info(ids))
        expected = oracle.gau(numpy(params), np.asarray(x[0]), causal=causal, positions=POSITIONS, ids=ids, **options)
        np.testing.assert_allclose(y[0], expected, atol=1e-11)


@pytest.mark.parametrize(('fields', 'options'), [FORMS['quad'], FORMS['flash']], ids=['quad', 'flash'])
def test_gradients_are_the_formula(fields, options):
    module = unit(**fields)
    params, x, c = parameters(module), normal(1, 1, N, D), np.random.default_rng(2).standard_normal((N, D))
    leaves, structure = jax.tree.flatten(params)

    def slow(x, *leaves):
        tree = jax.tree.unflatten(structure, leaves)
        return (oracle.gau(tree, x[0], causal=True, positions=POSITIONS, **options) * c).sum()

    expected, direction = finite_difference(slow, [np.asarray(a) for a in (x, *leaves)], 3)

    def fast(x, params):
        return (apply(module, params, x, info())[0] * c).sum()

    gradient = jax.jit(jax.grad(fast, (0, 1)))(x, params)
    along = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
    np.testing.assert_allclose(along, expected, rtol=1e-6)


def test_attention_that_is_the_identity_leaves_a_gated_linear_unit():
    # beta = 0 and gamma = 0 leave A = relu(b)^2; a bias of 1 at distance 0 and 0 elsewhere makes it I.
    module = unit()
    params = parameters(module)
    params['query_key'] = jax.tree.map(jnp.zeros_like, params['query_key'])
    params['relative_bias']['table'] = jnp.zeros((1, 2 * N - 1)).at[0, N - 1].set(1)
    x = normal(1, 1, N, D)
    y = apply(module, params, x, info())
    w, b = params['uv']['kernel'], params['uv']['bias']
    u, v = (jax.nn.silu(x @ w[:, i] + b[i]) for i in (0, 1))
    np.testing.assert_allclose(y, (u * v) @ params['out']['kernel'] + params['out']['bias'], atol=1e-12)


def test_a_gate_of_one_leaves_attention():
    # u with kernel 0 and a bias whose silu is 1: the same as the unit that has no gate.
    gated, plain = unit(), unit(gate='none')
    params = parameters(gated)
    one = 1.2784645427610738  # silu(1.278...) = 1
    params['uv']['kernel'] = params['uv']['kernel'].at[:, 0].set(0)
    params['uv']['bias'] = params['uv']['bias'].at[0].set(one)
    np.testing.assert_allclose(jax.nn.silu(one), 1, atol=1e-12)
    ungated = params | {'uv': {'kernel': params['uv']['kernel'][:, 1:], 'bias': params['uv']['bias'][1:]}}
    x = normal(1, 1, N, D)
    y = apply(plain, ungated, x, info())
    np.testing.assert_allclose(apply(gated, params, x, info()), y, atol=1e-12)


def test_temperature_multiplies_the_product():
    module, plain = unit(temperature='learned'), unit()
    params = parameters(module) | {'temperature': {'scale': jnp.asarray(3.0)}}
    x = normal(1, 1, N, D)
    scaled = {name: value for name, value in params.items() if name != 'temperature'}
    scaled['query_key'] = jax.tree.map(lambda p: p.at[0].multiply(3), params['query_key'])
    y = apply(plain, scaled, x, info())
    np.testing.assert_allclose(apply(module, params, x, info()), y, atol=1e-11)


def test_rope_local_rotates_the_queries_and_keys_inside_chunks_alone():
    x, tokens = normal(1, 1, N, S), info()
    params = {'gamma': normal(2, 4, 1, S), 'beta': normal(3, 4, 1, S)}
    plain, local, rotated = (
        ScaleOffset(4, 1, 'normal', count, 'float64').apply({'params': params}, x, tokens=tokens) for count in (0, 2, 4)
    )
    for role in range(4):
        np.testing.assert_array_equal(local[role], (rotated if role < 2 else plain)[role])
        assert np.abs(rotated[role] - plain[role]).max() > 0.1


def test_the_scale_of_far_queries_and_keys_starts_as_ones():
    near = 'direct', 'linear'

    def gamma(**fields):
        module = unit(**CHUNKS | fields)
        return nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, N, D)), info()))['params']['query_key']['gamma']

    far = gamma(core=FarChunksCore, pairs=(*near, 'far'))
    assert np.abs(gamma(pairs=near)).max() < 0.1
    assert np.abs(far[:4]).max() < 0.1
    np.testing.assert_array_equal(far[4:], np.ones((2, 1, S)))


def test_shifted_keys_are_those_of_the_token_before():
    shared, shifted = unit(), unit(key_input='shifted')
    x, ids = normal(3, 1, N, D), [1] * 10 + [2] * (N - 10)
    params = parameters(shifted)
    own = {name: leaf for name, leaf in params.items() if name != 'key_shift'}
    unmixed = params | {'key_shift': {'mix': jnp.zeros(S)}}
    np.testing.assert_array_equal(apply(shifted, unmixed, x, info(ids)), apply(shared, own, x, info(ids)))
    z, mix = normal(4, 1, N, S), normal(5, S)
    before = np.where(np.diff([0, *ids])[:, None], 0, np.roll(z[0], 1, axis=0))
    found = KeyShift('float64').apply({'params': {'mix': mix}}, z, info(ids))[0]
    assert max_error(found, (1 - mix) * z[0] + mix * before) < 1e-14
