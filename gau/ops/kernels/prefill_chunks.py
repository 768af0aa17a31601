"""A block of a prompt in a FLASH layer on a GPU: norm, projections, attention, gate, output, residual and state.

What `gau.ops.kernels.decode_chunks` does for a token, in three kernels for hundreds or thousands of them. Those of
training are more, with the library's matmuls and the compiler's slices and casts between them, and a prompt would wait
for their launches. In a short block attention is quadratic between chunks as well; a long one has a state for each
chunk (`prefill_long`).
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.decoding import DecodePosition, State, chunks_in_sum, scale_of_state
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.decode_chunks import PRECISION, Parameters
from gau.ops.kernels.launch import launch
from gau.ops.kernels.prefill_long import LongBlock
from gau.ops.kernels.tile_sizes import cdiv, power_of_two
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.norms import NORM_EPSILON
from gau.ops.scores import Scoring
from gau.ops.tracing import choose, traced_once


@traced_once('spec')
def prefill_gated_chunks(
    x_BTD: Array,
    parameters: Parameters,
    table: tuple[Array, Array] | None,
    state: State,
    *,
    position: DecodePosition,
    spec: ChunkSpec,
) -> tuple[Array, State]:
    """Returns x + GAU(ScaleNorm(x)) of a block of tokens in each row, [B, T, D], and the new state.

    The block is short or long by `position.reader`.

    Args:
      x_BTD: the residual stream, bfloat16 or float32, finite at padding; T is a multiple of the chunk.
      parameters: of the layer.
      table: cosines and sines of each token's position, float32 [B, T, S / 2], or None.
      state: `k`, `k_lin`, `v` and `sum` of one head (`gau.ops.decoding`); with shifted keys `before`, z of the token
        before, [B, S]; with a gate `gate` and `count`.
      position: where the tokens stand; rows that take tokens begin a chunk with the first, and in a short block with a
        window of two chunks their sequence.
      spec: causal, relu2, both branches.
    """
    from gau.ops.kernels import prefill_chunks_triton as kernels
    from gau.ops.kernels import prefill_long_triton as long_kernels

    (batch, t, width), dtype = x_BTD.shape, x_BTD.dtype
    size, rows, groups = spec.chunk_size, batch * t, t // spec.chunk_size
    expanded, inner = parameters.out_ED.shape[0], parameters.z_DS.shape[1]
    states = choose(position.reader, {'short': False, 'long': True})
    tiles = (tile_sizes.PREFILL_LONG if states else tile_sizes.PREFILL)[str(dtype)]
    half, block_s = (inner + 1) // 2, power_of_two(inner)
    sizes = {'R': rows, 'E': expanded, 'S': inner, 'PRECISION': PRECISION}
    # The compiler reads these once for all layers.
    before_B = (position.start_B // size).astype(jnp.int32)
    chunks_BG = chunks_in_sum(before_B[:, None] + jnp.arange(groups), spec)
    state_scale_BG = scale_of_state(chunks_BG, spec, jnp.float32)
    shifted, gated, none = parameters.mix_S is not None, parameters.gate_D is not None, parameters.norm
    # What is not there has a pointer all the same.
    old = {name: state.get(name, none) for name in ('sum', 'k', 'k_lin', 'v', 'gate', 'count', 'before')}
    more = {'NEAR': spec.window, 'GATED': gated}
    # (Of long blocks nobody takes all chunks at once.)
    more |= {'BLOCK_G': 16 if states else power_of_two(groups), 'BLOCK_C': power_of_two(size)}
    bias_P, new = parameters.bias_P, {}
    score_scale, over_visible = _normaliser(spec.scoring, spec.window * size, inner)
    scoring = {'BIAS': bias_P is not None, 'SCORE_SCALE': score_scale, 'OVER_VISIBLE': over_visible}
    bias_P = state_scale_BG if bias_P is None else bias_P

    shift = (parameters.mix_S, state['before']) if shifted else (none, none)
    gate = (parameters.gate_D, parameters.gate_bias) if gated else (none, none)
    of_z = parameters.z_DS, parameters.z_bias_S, parameters.gamma_RS, parameters.beta_RS, *(table or (none, none))
    z_fields = {
        'T': t,
        'D': width,
        'ROPE': table is not None,
        'SHIFTED': shifted,
        'EPSILON': NORM_EPSILON,
        'BLOCK_M': tiles.block_m,
        'BLOCK_K': tiles.block_k,
        'BLOCK_H': tiles.block_h,
    }
    # (Others read what `before` was; the last kernel writes over it.)
    like_roles = jax.ShapeDtypeStruct((4, rows, inner), dtype), jax.ShapeDtypeStruct(shift[1].shape, shift[1].dtype)
    if states:
        block = LongBlock(x_BTD, parameters, old, before_B, position.length_B, state_scale_BG, spec, gated)
        scales, logits = block.scales(gate)
        roles, before = launch(
            long_kernels.prefill_roles_kernel,
            *(x_BTD, parameters.norm, scales, *of_z, *shift, position.length_B),
            outputs=like_roles,
            grid=(cdiv(half, tiles.block_h), cdiv(rows, tiles.block_m)),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            R=rows,
            S=inner,
            PRECISION=PRECISION,
            **z_fields,
        )
        o_RE, activations, new = block.attention(scales, roles, logits, bias_P, scoring)
    else:
        activations, roles, before, logits = launch(
            kernels.prefill_projections_kernel,
            *(x_BTD, parameters.norm, parameters.uv_D2E, parameters.uv_bias_2E, *of_z, shift[0], *gate, shift[1]),
            position.length_B,
            outputs=[
                jax.ShapeDtypeStruct((rows, 2 * expanded), dtype),
                *like_roles,
                jax.ShapeDtypeStruct((rows,), jnp.float32),
            ],
            grid=(cdiv(2 * expanded, tiles.block_n) + cdiv(half, tiles.block_h) + gated, cdiv(rows, tiles.block_m)),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            GATED=gated,
            BLOCK_N=tiles.block_n,
            **z_fields,
            **sizes,
        )
        block_e = min(tiles.block_e, power_of_two(expanded))
        block_m = min(tiles.attention_m, power_of_two(size))
        (o_RE,) = launch(
            kernels.prefill_attention_kernel,
            *(activations, roles, state['sum'], bias_P, before_B, state_scale_BG, logits, old['count']),
            outputs=[jax.ShapeDtypeStruct((rows, expanded), dtype)],
            grid=(cdiv(expanded, block_e), groups * cdiv(size, block_m), batch),
            num_warps=tiles.attention_warps,
            num_stages=tiles.attention_stages,
            G=groups,
            C=size,
            MEAN=spec.mean,
            BLOCK_M=block_m,
            BLOCK_N=min(tiles.attention_n, power_of_two(size)),
            BLOCK_S=block_s,
            BLOCK_E=block_e,
            **scoring,
            **sizes,
            **more,
        )
    written = [name for name in old if name in state]
    inputs = o_RE, parameters.out_ED, parameters.out_bias_D, x_BTD, activations, roles, position.length_B, logits
    new = new | ({'before': before} if shifted else {})
    inputs = *inputs, *(new.get(name, none) for name in ('sum', 'count', 'before'))
    state_e = min(tiles.state_e, power_of_two(expanded))
    y_BTD, *rest = launch(
        kernels.prefill_output_kernel,
        *(*inputs, *old.values()),
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (x_BTD, *old.values())],
        grid=(batch * cdiv(expanded, state_e) + cdiv(rows, tiles.output_m) * cdiv(width, tiles.block_out),),
        num_warps=tiles.output_warps,
        num_stages=tiles.output_stages,
        overwrite={len(inputs) + number: 1 + number for number, name in enumerate(old) if name in written},
        B=batch,
        G=groups,
        C=size,
        D=width,
        STATES=states,
        SHIFTED=shifted,
        BLOCK_M=tiles.output_m,
        BLOCK_K=tiles.output_k,
        BLOCK_N=tiles.block_out,
        BLOCK_S=block_s,
        BLOCK_E=state_e,
        **sizes,
        **more,
    )
    return y_BTD, {name: x for name, x in zip(old, rest, strict=True) if name in written}


def _normaliser(scoring: Scoring, size: int, width: int) -> tuple[float, int]:
    """Returns the factor on q.k, and what is divided by the tokens seen: 0 nothing, 1 q.k too, 2 the weight."""
    return choose(
        scoring.normalizer,
        {
            'paper': (1 / size, 0),
            'fixed': (1 / scoring.length, 0),
            'visible': (1.0, 1),
            'su': (width**-0.5, 2),
        },
    )
