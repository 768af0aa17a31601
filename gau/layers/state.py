"""The state of a layer while sequences are decoded: variables of the collection 'cache', a tree beside the parameters.

The states have the shapes of `gau.ops.decoding` with the heads H after the batch B. They start as zeros.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.common import TokenInfo, over_heads, param_dtype
from gau.layers.positions import bias_in_chunk
from gau.ops.chunk_window import window_token
from gau.ops.decoding import linear_block, mixed_chunk_block, quadratic_block
from gau.ops.far_decoding import chosen_chunks_block, chosen_chunks_token, chunk_before_block
from gau.ops.kernels.decode_cache import decode_with_cache
from gau.ops.kernels.gated_mixed_chunk_block import gated_mixed_chunk_block


def quadratic_with_state(core: nn.Module, q_BHTS: Array, k_BHTS: Array, v_BHTE: Array, tokens: TokenInfo) -> Array:
    """`quadratic_block` over the heads of a `QuadraticCore`; returns [B, H, T, E]."""

    def attend(q, k, v, state, bias_BTM):
        return quadratic_block(q, k, v, state, position=tokens.decode, scoring=core.scoring, bias_BTM=bias_BTM)

    exists = core.has_variable('cache', 'k')
    capacity = core.get_variable('cache', 'k').shape[2] if exists else tokens.decode.capacity
    shapes = {name: ((*x.shape[:2], capacity, x.shape[-1]), x.dtype) for name, x in (('k', k_BHTS), ('v', v_BHTE))}
    bias_HBTM = core.bias(capacity, tokens.decode.positions_BT(v_BHTE.shape[2]))
    if exists and v_BHTE.shape[2] == 1 and core.has_cache_kernel and tokens.decode.in_place:
        state = {name: core.get_variable('cache', name) for name in shapes}
        fields = {'position': tokens.decode, 'scoring': core.scoring, 'bias_HB1M': bias_HBTM}
        o_BH1E, state = decode_with_cache(q_BHTS, k_BHTS, v_BHTE, state, **fields)
        for name in shapes:
            core.put_variable('cache', name, state[name])
        return o_BH1E
    return carried(core, shapes, attend, q_BHTS, k_BHTS, v_BHTE, bias=bias_HBTM)


def mixed_chunk_with_state(
    core: nn.Module,
    q_BHTS: Array,
    k_BHTS: Array,
    q_lin_BHTS: Array,
    k_lin_BHTS: Array,
    gate_BHT1: Array | None,
    v_BHTE: Array,
    tokens: TokenInfo,
) -> Array:
    """`mixed_chunk_block`, or `window_token`, over the heads of a `MixedChunkCore`; returns [B, H, T, E]."""

    def attend(*arrays_and_state):
        *arrays, gate_BT1, v_BTE, state, bias_CC = arrays_and_state
        fields = {'position': tokens.decode, 'spec': core.spec}
        if tokens.decode.opened_B is not None and core.has_window:
            return window_token(*arrays, v_BTE, state, gate_B11=gate_BT1, bias_B1M=bias_CC, **fields)
        return mixed_chunk_block(*arrays, v_BTE, state, gate_BT1=gate_BT1, bias_CC=bias_CC, **fields)

    size, places = core.chunk_size, core.spec.window * core.chunk_size

    def by_token(x):
        return (*x.shape[:2], places, x.shape[-1]), x.dtype

    shapes, bias_HCC = {'v': by_token(v_BHTE)}, None
    if core.spec.has_local:
        shapes['k'] = by_token(k_BHTS)
        if v_BHTE.shape[2] == 1:
            bias_HCC = core.bias(places, places - size + tokens.decode.start_B[:, None] % size)
        else:
            bias_HCC = bias_in_chunk(core.bias(places))
    if core.spec.has_global:
        shapes['k_lin'] = by_token(k_lin_BHTS)
        sums = (*v_BHTE.shape[:2], k_lin_BHTS.shape[-1], v_BHTE.shape[-1])
        shapes['sum'] = sums, param_dtype(v_BHTE.dtype)
    if gate_BHT1 is not None:
        shapes['gate'] = by_token(gate_BHT1)
        shapes['count'] = (*gate_BHT1.shape[:2], 1), gate_BHT1.dtype
    arrays = q_BHTS, k_BHTS, q_lin_BHTS, k_lin_BHTS, gate_BHT1, v_BHTE
    return carried(core, shapes, attend, *arrays, bias=bias_HCC)


def gated_mixed_chunk_with_state(
    core: nn.Module, *arrays: Array, bias_P: Array | None, gate_BT1: Array | None, tokens: TokenInfo
) -> Array:
    """`gated_mixed_chunk_block` with the variables of a `MixedChunkCore` of one head; returns [B, T, E]."""
    names = 'k', 'k_lin', 'v', 'sum', *(() if gate_BT1 is None else ('gate', 'count'))
    state = {name: core.get_variable('cache', name)[:, 0] for name in names}
    fields = {'position': tokens.decode, 'spec': core.spec, 'bias_P': bias_P, 'gate_BT1': gate_BT1}
    o_BTE, state = gated_mixed_chunk_block(*arrays, state, **fields)
    for name in names:
        core.put_variable('cache', name, state[name][:, None])
    return o_BTE


def far_chunks_with_state(core: nn.Module, q_BHTS: Array, k_BHTS: Array, v_BHTE: Array, tokens: TokenInfo) -> Array:
    """`gau.ops.far_decoding` for the head of a `FarChunksCore`, before its other branches; returns [B, 1, T, E].

    Its state has no axis of heads: XLA would copy keys and values of all tokens in every step, to move an axis of one.
    """
    q_BTS, k_BTS, v_BTE = q_BHTS[:, 0], k_BHTS[:, 0], v_BHTE[:, 0]
    size, (batch, _, s), e = core.chunk_size, k_BTS.shape, v_BTE.shape[-1]
    sums, decode = param_dtype(v_BTE.dtype), tokens.decode
    if core.far_chunks == 1:
        shapes = {'far_k': ((batch, 2 * size, s), k_BTS.dtype), 'far_v': ((batch, size, e), v_BTE.dtype)}
    else:
        exists = core.has_variable('cache', 'far_mean')
        chunks = core.get_variable('cache', 'far_mean').shape[1] if exists else -(-decode.capacity // size)
        shapes = {
            'far_k': ((batch, chunks * size, s), k_BTS.dtype),
            'far_v': ((batch, chunks * size, e), v_BTE.dtype),
            'far_mean': ((batch, chunks, s), sums),
            'far_query': ((batch, s), sums),
            'far_index': ((batch, core.far_chunks), jnp.int32),
        }
    in_window = decode.opened_B is not None and core.has_window
    if in_window:
        shapes['far_next'] = shapes['far_index']
    variables = {name: core.variable('cache', name, jnp.zeros, *shape) for name, shape in shapes.items()}
    state = {name: variable.value for name, variable in variables.items()}
    if core.far_chunks == 1:
        own_BCE = jnp.zeros((batch, size, e), v_BTE.dtype)
        if core.has_variable('cache', 'v'):
            own_BCE = core.get_variable('cache', 'v')[:, 0, -size:]
        o_BTE, state = chunk_before_block(q_BTS, k_BTS, v_BTE, own_BCE, state, position=decode)
    else:
        decode_far = chosen_chunks_token if in_window else chosen_chunks_block
        o_BTE, state = decode_far(q_BTS, k_BTS, v_BTE, state, position=decode)
    for name, variable in variables.items():
        variable.value = state[name]
    return o_BTE[:, None]


def begin_quadratic_state(core: nn.Module, k_BHTS: Array, v_BHTE: Array) -> None:
    """Puts keys and values of the first T tokens of every sequence into the state of a `QuadraticCore`."""
    for name, x_BHTS in (('k', k_BHTS), ('v', v_BHTE)):
        x_BHMS = core.get_variable('cache', name)
        n = min(x_BHTS.shape[2], x_BHMS.shape[2])
        core.put_variable('cache', name, x_BHMS.at[:, :, :n].set(x_BHTS[:, :, :n].astype(x_BHMS.dtype)))


def linear_with_state(
    core: nn.Module,
    q_BHTF: Array,
    k_BHTF: Array,
    v_BHTK: Array,
    key_log_scale_BHT: Array | None,
    tokens: TokenInfo,
) -> Array:
    """`linear_block` over the heads of a `PerformerCore`; returns [B, H, T, K]."""

    def attend(q, k, v, key_log_scale, state, _):
        return linear_block(q, k, v, key_log_scale, state, position=tokens.decode)

    dtype = param_dtype(v_BHTK.dtype)
    shapes = {'sum': ((*v_BHTK.shape[:2], k_BHTF.shape[-1], v_BHTK.shape[-1] + 1), dtype)}
    if key_log_scale_BHT is not None:
        shapes['log_scale'] = v_BHTK.shape[:2], dtype
    return carried(core, shapes, attend, q_BHTF, k_BHTF, v_BHTK, key_log_scale_BHT, bias=None)


def carried(
    core: nn.Module,
    shapes: dict[str, tuple[tuple[int, ...], Any]],
    attend: Callable[..., tuple[Array, dict[str, Array]]],
    *x_BHTS: Array | None,
    bias: Array | None,
) -> Array:
    """Runs `attend(..., state, bias)` over the heads with the core's variables as state, and stores the new one.

    Args:
      core: whose variables of the collection 'cache' the state is.
      shapes: shape and dtype of every array of the state, by name.
      attend: single-head function that returns outputs and the new state.
      *x_BHTS: its arguments.
      bias: relative bias with the heads first, or None.
    """
    variables = {name: core.variable('cache', name, jnp.zeros, *shape) for name, shape in shapes.items()}
    state = {name: variable.value for name, variable in variables.items()}
    o_BHTE, state = over_heads(attend, *x_BHTS, state, bias=bias)
    for name, variable in variables.items():
        variable.value = state[name]
    return o_BHTE
