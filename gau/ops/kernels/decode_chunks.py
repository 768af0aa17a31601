"""One token of a FLASH layer on a GPU: norm, projections, attention, gate, output and residual in three kernels.

    h = ScaleNorm(x)     [u, v, z] = silu(h W + b)     q, k, q_lin, k_lin = rope(z gamma + beta)
    y = x + (u * (a v + q_lin sum)) Wo + bo

The state is a window of `gau.ops.chunk_window`, whose arrays are written in place. Reading the weights takes a row of
the batch as long as dozens, so what is to be saved are kernels: the compiler makes a dozen and more for a layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.decoding import DecodePosition, State, chunks_in_sum, scale_of_state
from gau.ops.kernels import decode_row, tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import cdiv, power_of_two
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.norms import NORM_EPSILON
from gau.ops.tracing import choose, traced_once

# How the matrix units round the factors of a float32 matmul: not at all.
PRECISION = 'ieee'


class Parameters(NamedTuple):
    """The parameters of a layer with its norm: matrices in the compute type, the rest float32.

    Attributes:
      norm: the scale of ScaleNorm, one number.
      uv_D2E, uv_bias_2E: the projections of gate and values, [D, 2, E] or [D, 2 E].
      z_DS, z_bias_S: the projection of queries and keys.
      gamma_RS, beta_RS: scale and offset of the four of them; of six, the last two of which are of far chunks.
      out_ED, out_bias_D: the last projection.
      bias_P: relative bias by distance in a window of W chunks, [2 W C - 1], or None.
      mix_S: of shifted keys (`gau.layers.short_convolution.KeyShift`), or None.
      gate_D, gate_bias: of a gate of the state (`gau.layers.decay_gate.DecayGate`), or None.
    """

    norm: Array
    uv_D2E: Array
    uv_bias_2E: Array
    z_DS: Array
    z_bias_S: Array
    gamma_RS: Array
    beta_RS: Array
    out_ED: Array
    out_bias_D: Array
    bias_P: Array | None
    mix_S: Array | None = None
    gate_D: Array | None = None
    gate_bias: Array | None = None


@traced_once('spec')
def decode_gated_chunks(
    x_BD: Array,
    parameters: Parameters,
    table: tuple[Array, Array] | None,
    window: State,
    *,
    position: DecodePosition,
    spec: ChunkSpec,
) -> tuple[Array, State]:
    """Returns x + GAU(ScaleNorm(x)) of a token in each row, [B, D], and the new window.

    Args:
      x_BD: the residual stream, bfloat16 or float32.
      parameters: of the layer.
      table: cosines and sines of each row's position, float32 [B, S / 2], or None.
      window: `k`, `k_lin`, `v` and `sum` of one head (`gau.ops.chunk_window`); with shifted keys `before`, z of the
        token before, [B, S]; with a gate `gate` and `count`; with several far chunks `far_k` and so on.
      position: where the tokens stand, and where the window was opened.
      spec: causal, relu2, both branches.
    """
    from gau.ops.kernels import decode_chunks_triton as kernels
    from gau.ops.kernels import decode_far_triton as far_kernels

    (batch, width), dtype = x_BD.shape, x_BD.dtype
    places, expanded = window['v'].shape[1:]
    inner = parameters.z_DS.shape[1]
    tiles = tile_sizes.decode_tiles(batch, str(dtype))
    scales = _scales(position, spec, inner)
    # And the first place of the sequence, where the window begins before it; and the place in the sequence.
    place_B = _place(position, spec)
    zero_B = jnp.maximum(place_B - position.start_B, 0)
    to_B = jnp.where(position.length_B > 0, place_B, places)
    place_3B = jnp.stack([to_B, zero_B, position.start_B]).astype(jnp.int32)
    row_tiles = decode_row.row_tiles(width, expanded, inner) if batch == 1 else None
    if row_tiles is not None:
        fields = {'place_3': place_3B[:, 0], 'scales': scales, 'spec': spec, 'tiles': row_tiles}
        return decode_row.decode_row(x_BD, parameters, table, window, **fields)

    block_b = min(power_of_two(batch), tiles.block_b)
    rows = {'B': batch, 'BLOCK_B': block_b, 'PRECISION': PRECISION}
    half = (inner + 1) // 2
    like_q = jax.ShapeDtypeStruct((batch, inner), dtype)
    like_e = jax.ShapeDtypeStruct((batch, expanded), dtype)
    none, shifted, gated = parameters.norm, parameters.mix_S is not None, parameters.gate_D is not None
    far = 'far_k' in window
    kept, chosen = (window['far_k'].shape[1], window['far_index'].shape[1]) if far else (0, 0)
    # What is not there has a pointer all the same.
    like_none = jax.ShapeDtypeStruct(none.shape, none.dtype)
    old = {name: window.get(name, none) for name in ('v', 'k', 'k_lin', 'before', 'gate', 'far_k', 'far_v')}
    inputs = (
        *(x_BD, parameters.norm, parameters.uv_D2E, parameters.uv_bias_2E, parameters.z_DS, parameters.z_bias_S),
        *(parameters.gamma_RS, parameters.beta_RS, *(table or (none, none)), place_3B),
        parameters.mix_S if shifted else none,
        *((parameters.gate_D, parameters.gate_bias) if gated else (none, none)),
    )
    u_BE, q_BS, q_lin_BS, q_far_BS, *new = launch(
        kernels.decode_projections_kernel,
        *inputs,
        *old.values(),
        outputs=[
            *(like_e, like_q, like_q, like_q if far else like_none),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old.values()),
        ],
        grid=(cdiv(2 * expanded, tiles.block_n) + cdiv(half, tiles.block_h) + gated, cdiv(batch, block_b)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        overwrite={len(inputs) + number: 4 + number for number, name in enumerate(old) if name in window},
        D=width,
        E=expanded,
        S=inner,
        PLACES=places,
        FAR=kept,
        ROPE=table is not None,
        SHIFTED=shifted,
        GATED=gated,
        EPSILON=NORM_EPSILON,
        BLOCK_K=min(power_of_two(width), tiles.block_k),
        BLOCK_N=tiles.block_n,
        BLOCK_H=tiles.block_h,
        **rows,
    )
    window = window | {name: x for name, x in zip(old, new, strict=True) if name in window}

    bias_P = parameters.bias_P
    block_e = min(power_of_two(expanded), tiles.block_e)
    kernel, programs, old, constants = kernels.decode_attention_kernel, cdiv(expanded, block_e), {}, {}
    inputs = (
        *(q_BS, q_lin_BS, u_BE, *(window[name] for name in ('k', 'k_lin', 'v', 'sum'))),
        *(scales if bias_P is None else bias_P, place_3B, scales),
        *((window['gate'], window['count']) if gated else (scales, scales)),
    )
    if far:
        far_e = min(power_of_two(expanded), tiles.far_e)
        kernel, programs = far_kernels.decode_far_attention_kernel, programs + cdiv(expanded, far_e) + 1
        inputs += (q_far_BS, *(window[name] for name in ('far_k', 'far_v', 'far_index')))
        old = {name: window[name] for name in ('far_mean', 'far_query', 'far_next')}
        constants = {'FAR': kept, 'R': chosen, 'FAR_E': far_e, 'BLOCK_R': power_of_two(chosen)}
        constants['FAR_W'] = min(power_of_two(spec.chunk_size), tiles.far_w)
    o_XBE, *new = launch(
        kernel,
        *inputs,
        *old.values(),
        outputs=[
            jax.ShapeDtypeStruct((1 + far, batch, expanded), dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old.values()),
        ],
        grid=(programs, batch),
        num_warps=tiles.attention_warps,
        num_stages=tiles.attention_stages,
        overwrite={len(inputs) + number: 1 + number for number in range(len(old))},
        C=spec.chunk_size,
        S=inner,
        E=expanded,
        PLACES=places,
        BIAS=bias_P is not None,
        NEAR=spec.window,
        GATED=gated,
        MEAN=spec.mean,
        PRECISION=PRECISION,
        BLOCK_W=min(power_of_two(places), tiles.block_w),
        BLOCK_S=power_of_two(inner),
        BLOCK_E=block_e,
        BLOCK_C=power_of_two(spec.chunk_size),
        **constants,
    )
    window |= zip(old, new, strict=True)
    (y_BD,) = launch(
        kernels.decode_output_kernel,
        *(o_XBE, parameters.out_ED, parameters.out_bias_D, x_BD),
        outputs=[jax.ShapeDtypeStruct(x_BD.shape, dtype)],
        grid=(cdiv(width, tiles.block_out), cdiv(batch, block_b)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        E=expanded,
        D=width,
        FAR=far,
        BLOCK_K=min(power_of_two(expanded), tiles.block_k),
        BLOCK_N=tiles.block_out,
        **rows,
    )
    return y_BD, window


def _place(position: DecodePosition, spec: ChunkSpec) -> Array:
    size = spec.chunk_size
    return position.start_B - position.opened_B // size * size + (spec.window - 1) * size


def _scales(position: DecodePosition, spec: ChunkSpec, width: int) -> Array:
    """Returns factors of each row: on q.k, on weights nearby, on those before and the sum; float32 [3, B]."""
    size, scoring = spec.chunk_size, spec.scoring
    chunks_B = position.start_B // size
    visible_B = jnp.minimum(chunks_B, spec.window - 1) * size + position.start_B % size + 1
    visible_B = visible_B.astype(jnp.float32)
    ones_B = jnp.ones_like(visible_B)
    score_B = choose(
        scoring.normalizer,
        {
            'paper': ones_B / (spec.window * size),
            'fixed': ones_B / scoring.length,
            'visible': 1 / visible_B,
            'su': ones_B * width**-0.5,
        },
    )
    weight_B = 1 / visible_B if scoring.normalizer == 'su' else ones_B
    state_B = scale_of_state(chunks_in_sum(chunks_B, spec), spec, jnp.float32)
    return jnp.stack([score_B, weight_B, state_B])
