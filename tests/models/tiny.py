"""Small models for the tests: every architecture and objective, with parameters that matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gau.layers.common import TokenInfo
from gau.models.architectures import ARCHITECTURES
from gau.models.blocks import Block
from gau.models.config import default_config, resolve
from gau.models.fused_block import FusedBlock, first_residual
from gau.models.registry import build
from tests.numerics import max_error, normal, random_like

# Tests compile much and run little.
compile_fast = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

VOCAB = 11
CONTEXT = 24
CASES = [
    (name, objective)
    for name, architecture in ARCHITECTURES.items()
    for objective in ('lm', 'mlm')
    if not (architecture.not_causal and objective == 'lm')
]
CAUSAL = [name for name, objective in CASES if objective == 'lm']


def tiny_config(name, objective='lm', *, context=CONTEXT, **fields):
    """A resolved config of two narrow layers in float64."""
    config = default_config()
    config.name = name
    applicable = ARCHITECTURES[name].fields
    small = {
        'num_layers': 2,
        'model_dim': 8,
        'query_key_dim': 4,
        'chunk_size': 5,
        'num_heads': 2 if 'head_dim' in applicable else 1,
        'projection_rank': 3,
        'vocab_loss_slice': 7,
        'dtype': 'float64',
    }
    for field, value in (small | fields).items():
        if (field in applicable and value is not None) or field in fields:
            config[field] = value
    return resolve(config, causal=objective == 'lm', context=context)


def make(name, objective='lm', *, context=CONTEXT, **fields):
    """A model and its parameters, of order 1."""
    model = build(tiny_config(name, objective, context=context, **fields), vocab_size=VOCAB, causal=objective == 'lm')
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))['params']
    return model, random_like(shapes, 0)


def tokens(batch=1, n=CONTEXT, seed=3):
    """Random tokens [batch, n]."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (batch, n)))


def positions_of(ids):
    """Positions within documents, for segment ids [B, N]."""
    positions = np.zeros(np.shape(ids), int)
    for row, out in zip(np.asarray(ids), positions, strict=True):
        for document in np.unique(row):
            where = np.flatnonzero(row == document)
            out[where] = where - where[0]
    return jnp.asarray(positions)


@functools.partial(compile_fast, static_argnums=0)
def apply(model, params, tokens_BN, segment_ids_BN=None, positions_BN=None):
    """Logits."""
    return model.apply({'params': params}, tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN)


@functools.partial(compile_fast, static_argnums=0)
def losses_and_gradients(model, params, tokens_BN, weights_BN, segment_ids_BN=None, positions_BN=None):
    """Losses [B, N] of predicting the tokens themselves, and the gradient of their weighted sum."""

    def loss(params):
        nll = model.apply(
            {'params': params},
            tokens_BN,
            tokens_BN,
            segment_ids_BN=segment_ids_BN,
            positions_BN=positions_BN,
            method='token_losses',
        )
        return jnp.where(weights_BN != 0, nll * weights_BN, 0).sum(), nll

    (_, nll), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return nll, gradient


def expect_padding_to_reach_nothing(model, params, ids_BN):
    """Whatever numbers stand at padding in the stream before a block: layers before it leave any there, but no NaN."""
    positions_BN = positions_of(ids_BN)
    rope = model.apply({'params': params}, positions_BN, method='_rope_tables')
    fused, token_info = model.implementation.norm == 'triton', TokenInfo(ids_BN, positions_BN, rope)
    block = (FusedBlock if fused else Block)(model.config, 0, model.causal, model.implementation)
    padding, dtype = ids_BN[..., None] == 0, model.config.dtype

    def loss(variables, x_BND, bias_D):
        x = first_residual(x_BND, dtype)._replace(bias_D=bias_D) if fused else x_BND
        x, _ = block.apply({'params': variables}, x, token_info, True)
        total_BND = x.x_BND + x.bias_D if fused else x
        return (jnp.where(padding, 0, total_BND) ** 2).sum(), total_BND

    def run(x_BND):
        return differentiated(params['blocks_0'], x_BND.astype(dtype), bias_D)

    differentiated = compile_fast(jax.value_and_grad(loss, range(2), has_aux=True))
    shape = (*ids_BN.shape, model.config.model_dim)
    x_BND, other_BND = normal(0, *shape), 100 * normal(1, *shape)
    bias_D = normal(2, shape[-1]).astype(jnp.promote_types(dtype, 'float32')) if fused else None
    (value, total_BND), gradients = run(x_BND)
    found = run(jnp.where(padding, other_BND, x_BND))
    assert np.isfinite(found[0][1]).all()
    assert max_error(jnp.where(padding, 0, found[0][1]), jnp.where(padding, 0, total_BND)) == 0
    assert max_error((found[0][0], found[1]), (value, gradients)) == 0
    gradient_BND = found[1][1]
    assert (jnp.where(padding, gradient_BND, 0) == 0).all()
    assert (gradient_BND != 0).any()
