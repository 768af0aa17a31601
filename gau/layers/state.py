"""What a layer keeps between the blocks of a text: variables of the collection 'cache', one tree beside the parameters.

The states have the shapes of `gau.ops.decoding` with the heads H after the batch B. They start as zeros.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.common import TokenInfo, over_heads, param_dtype
from gau.layers.positions import bias_in_chunk
from gau.ops.decoding import linear_block, mixed_chunk_block, quadratic_block
from gau.ops.scores import Scoring


def quadratic_with_state(
    layer: nn.Module,
    q_BHTS: Array,
    k_BHTS: Array,
    v_BHTE: Array,
    tokens: TokenInfo,
    *,
    scoring: Scoring,
    bias: Callable[..., Array | None],
) -> Array:
    """`quadratic_block` over the heads of a layer, with `bias(n, positions)`; returns [B, H, T, E]."""

    def attend(q, k, v, state, bias_BTM):
        return quadratic_block(q, k, v, state, at=tokens.at, scoring=scoring, bias_BTM=bias_BTM)

    exists = layer.has_variable('cache', 'k')
    capacity = layer.get_variable('cache', 'k').shape[2] if exists else tokens.at.capacity
    shapes = {name: ((*x.shape[:2], capacity, x.shape[-1]), x.dtype) for name, x in (('k', k_BHTS), ('v', v_BHTE))}
    bias_HBTM = bias(capacity, tokens.at.positions_BT(v_BHTE.shape[2]))
    return _carried(layer, shapes, attend, q_BHTS, k_BHTS, v_BHTE, bias=bias_HBTM)


def mixed_chunk_with_state(
    layer: nn.Module,
    q_BHTS: Array,
    k_BHTS: Array,
    q_lin_BHTS: Array,
    k_lin_BHTS: Array,
    v_BHTE: Array,
    tokens: TokenInfo,
    *,
    bias: Callable[..., Array | None],
    chunk_size: int,
    branches: str,
    **fields,
) -> Array:
    """`mixed_chunk_block` over the heads of a layer, with the matrix of `bias(C)` or its rows; returns [B, H, T, E]."""

    def attend(q, k, q_lin, k_lin, v, state, bias_CC):
        return mixed_chunk_block(
            q,
            k,
            q_lin,
            k_lin,
            v,
            state,
            at=tokens.at,
            chunk_size=chunk_size,
            branches=branches,
            bias_CC=bias_CC,
            **fields,
        )

    def chunk_of(x):
        return (*x.shape[:2], chunk_size, x.shape[-1]), x.dtype

    shapes, bias_HCC = {'v': chunk_of(v_BHTE)}, None
    if branches != 'global':
        shapes['k'] = chunk_of(k_BHTS)
        one_token = v_BHTE.shape[2] == 1
        bias_HCC = (
            bias(chunk_size, tokens.at.start_B[:, None] % chunk_size) if one_token else bias_in_chunk(bias(chunk_size))
        )
    if branches != 'local':
        shapes['k_lin'] = chunk_of(k_lin_BHTS)
        sums = (*v_BHTE.shape[:2], k_lin_BHTS.shape[-1], v_BHTE.shape[-1])
        shapes['sum'] = sums, param_dtype(v_BHTE.dtype)
    return _carried(layer, shapes, attend, q_BHTS, k_BHTS, q_lin_BHTS, k_lin_BHTS, v_BHTE, bias=bias_HCC)


def linear_with_state(
    layer: nn.Module,
    q_BHTF: Array,
    k_BHTF: Array,
    v_BHTK: Array,
    key_log_scale_BHT: Array | None,
    tokens: TokenInfo,
) -> Array:
    """`linear_block` over the heads of a layer; returns [B, H, T, K]."""

    def attend(q, k, v, key_log_scale, state, _):
        return linear_block(q, k, v, key_log_scale, state, at=tokens.at)

    dtype = param_dtype(v_BHTK.dtype)
    shapes = {'sum': ((*v_BHTK.shape[:2], k_BHTF.shape[-1], v_BHTK.shape[-1] + 1), dtype)}
    if key_log_scale_BHT is not None:
        shapes['log_scale'] = v_BHTK.shape[:2], dtype
    return _carried(layer, shapes, attend, q_BHTF, k_BHTF, v_BHTK, key_log_scale_BHT, bias=None)


def _carried(layer, shapes, attend, *x_BHTS, bias):
    """Runs `attend(..., state, bias)` over the heads with the layer's variables as state, and keeps the new one."""
    variables = {name: layer.variable('cache', name, jnp.zeros, *shape) for name, shape in shapes.items()}
    state = {name: variable.value for name, variable in variables.items()}
    o_BHTE, state = over_heads(attend, *x_BHTS, state, bias=bias)
    for name, variable in variables.items():
        variable.value = state[name]
    return o_BHTE
