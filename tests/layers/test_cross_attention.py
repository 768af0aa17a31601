"""Layers that read a source, against the formula row by row and head by head: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.layers.common import Source, TokenInfo
from gau.layers.cross_attention import CrossGatedAttentionUnit, CrossMultiHeadAttention
from gau.ops.scores import Scoring
from tests.models.tiny import compile_fast
from tests.numerics import max_error, normal, random_like

B, N, M, D, S = 3, 5, 7, 8, 6
# The second row's source has a hole and ends early, the third one's is padding alone.
IDS = np.asarray([[1] * 7, [1, 1, 0, 1, 1, 0, 0], [0] * 7])
SOFTMAX, RELU2 = Scoring('softmax', None), Scoring('relu2', 'su')


def naive_attention(q_NS, k_MS, v_ME, seen_M, bias):
    """A V of one row and one head, of the keys that are there and no others."""
    if not seen_M.any():
        return jnp.zeros((len(q_NS), v_ME.shape[1]))
    k_KS, v_KE = k_MS[seen_M], v_ME[seen_M]
    s_NK = q_NS @ k_KS.T / np.sqrt(q_NS.shape[1])
    if bias is None:
        exp_NK = jnp.exp(s_NK)
        return exp_NK / exp_NK.sum(1, keepdims=True) @ v_KE
    return jnp.maximum(s_NK + bias, 0) ** 2 @ v_KE / len(k_KS)


def dense(params, x, name):
    return jnp.tensordot(x, params[name]['kernel'], 1) + params[name]['bias']


def naive(params, x_BND, h_BMD, layer):
    """The layer's formulas (gau/layers/cross_attention.py), row by row and head by head."""
    heads, outputs = layer.num_heads, []
    biases = [None] * heads if layer.scoring.function == 'softmax' else params['bias']
    for x_ND, h_MD, seen_M in zip(x_BND, h_BMD, np.asarray(IDS) > 0, strict=True):
        if isinstance(layer, CrossMultiHeadAttention):
            q_NHK, kv_M2HK = dense(params, x_ND, 'q')[:, 0], dense(params, h_MD, 'kv')
            arrays = [(q_NHK[:, i], kv_M2HK[:, 0, i], kv_M2HK[:, 1, i]) for i in range(heads)]
            of_heads = [naive_attention(*each, seen_M, bias) for each, bias in zip(arrays, biases, strict=True)]
            o_NHK = jnp.stack(of_heads, axis=1)
            outputs.append(jnp.tensordot(o_NHK, params['out']['kernel'], 2) + params['out']['bias'])
            continue
        u_NE, v_ME = jax.nn.silu(dense(params, x_ND, 'u')), jax.nn.silu(dense(params, h_MD, 'v'))
        z_NS, z_MS = jax.nn.silu(dense(params, x_ND, 'z')), jax.nn.silu(dense(params, h_MD, 'z_key'))
        (gamma_q, gamma_k), (beta_q, beta_k) = params['query_key']['gamma'], params['query_key']['beta']
        width, parts = v_ME.shape[1] // heads, []
        for i in range(heads):
            q_NS, k_MS = z_NS * gamma_q[i] + beta_q[i], z_MS * gamma_k[i] + beta_k[i]
            parts.append(naive_attention(q_NS, k_MS, v_ME[:, i * width : (i + 1) * width], seen_M, biases[i]))
        outputs.append(dense(params, u_NE * jnp.concatenate(parts, axis=1), 'out'))
    return jnp.stack(outputs)


def gau(heads, scoring):
    return CrossGatedAttentionUnit(12, S, heads, scoring, 'float64')


@pytest.mark.parametrize(
    'layer',
    [
        gau(2, RELU2),
        pytest.param(CrossMultiHeadAttention(2, 4, SOFTMAX, 'float64'), marks=pytest.mark.slow),
        pytest.param(CrossMultiHeadAttention(1, 8, RELU2, 'float64'), marks=pytest.mark.slow),
        *(pytest.param(gau(heads, RELU2), marks=pytest.mark.slow) for heads in (1, 4)),
        pytest.param(gau(2, SOFTMAX), marks=pytest.mark.slow),
    ],
    ids=lambda layer: f'{type(layer).__name__}-{layer.num_heads}-{layer.scoring.function}',
)
def test_values_and_gradients_are_those_of_the_formula(layer):
    x_BND, h_BMD, cotangent = normal(0, B, N, D), normal(1, B, M, D), normal(2, B, N, D)
    # What stands at padding of the source must not matter.
    h_BMD = h_BMD + 100 * (IDS[..., None] == 0)

    def apply(params, x_BND, h_BMD):
        info = TokenInfo(None, jnp.arange(N)[None], {}, source=Source(h_BMD, IDS))
        return layer.apply({'params': params}, x_BND, info)

    info = TokenInfo(None, jnp.arange(N)[None], {}, source=Source(h_BMD, IDS))
    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x_BND, info)['params'], 3)
    run, expected = (
        compile_fast(lambda *args, f=f: (*jax.vjp(f, *args)[1](cotangent), f(*args)))
        for f in (apply, lambda params, x_BND, h_BMD: naive(params, x_BND, h_BMD, layer))
    )
    found, wanted = run(params, x_BND, h_BMD), expected(params, x_BND, h_BMD)
    for part, of_formula in zip(found, wanted, strict=True):
        assert max_error(part, of_formula) < 1e-12
    gradient_BMD = np.asarray(found[2])
    assert (gradient_BMD[np.asarray(IDS) == 0] == 0).all()
    assert (gradient_BMD != 0).any(axis=(1, 2)).tolist() == [True, True, False]


def test_without_a_source_it_says_what_gives_one():
    with pytest.raises(UserError, match=r'^a model with cross-attention needs a source to read: train it with'):
        gau(1, RELU2).init(jax.random.key(0), normal(0, 1, N, D), TokenInfo(None, jnp.arange(N)[None], {}))
