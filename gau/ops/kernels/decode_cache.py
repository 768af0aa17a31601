"""One token of quadratic attention on a GPU: `gau.ops.decoding.quadratic_block` over the filled places alone.

The places of a row are cut into parts, for a row alone has too few programs for a GPU; a second kernel adds them up.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.decoding import DecodePosition, State
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import cdiv, power_of_two
from gau.ops.scores import Scoring
from gau.ops.tracing import choose

FUNCTIONS = ('softmax', 'relu2')
# How the matrix units round the factors of a float32 matmul: not at all.
PRECISION = 'ieee'


def decode_with_cache(
    q_BH1S: Array,
    k_BH1S: Array,
    v_BH1E: Array,
    state: State,
    *,
    position: DecodePosition,
    scoring: Scoring,
    bias_HB1M: Array | None = None,
) -> tuple[Array, State]:
    """Returns what `quadratic_block` does for one token a row, with all heads at once, [B, H, 1, E].

    Args:
      q_BH1S: queries; k_BH1S, v_BH1E: keys and values, bfloat16 or float32.
      state: `k` and `v`, [B, H, M, S] and [B, H, M, E].
      position: where the tokens stand.
      scoring: softmax or relu2.
      bias_HB1M: relative bias between the tokens and all places, or None.
    """
    from gau.ops.kernels import decode_cache_triton as kernels

    (batch, heads, _, inner), width, capacity = q_BH1S.shape, v_BH1E.shape[-1], state['k'].shape[2]
    rows, tiles, softmax = batch * heads, tile_sizes.DECODE_CACHE, scoring.function == 'softmax'
    block_e = min(power_of_two(width), tiles.block_e)
    # A multiple of block_m.
    span = tiles.block_m * min(tiles.most_blocks, max(1, capacity * rows // (tiles.block_m * tiles.min_programs)))
    parts = cdiv(capacity, span)
    bias = None if bias_HB1M is None else bias_HB1M[:, :, 0].swapaxes(0, 1).astype(jnp.float32)
    scales = _scales(position, scoring, inner)
    # A row without a token is read to its end, for nothing, and not written to.
    place_B = jnp.where(position.length_B > 0, position.start_B, capacity).astype(jnp.int32)
    old = state['k'], state['v']
    new_k, new_v = (x.astype(cache.dtype) for x, cache in zip((k_BH1S, v_BH1E), old, strict=True))
    inputs = q_BH1S, new_k, new_v, scales if bias is None else bias, place_B, scales, *old
    o_RXE, top_RX, total_RX, k_BHMS, v_BHME = launch(
        kernels.decode_cache_kernel,
        *inputs,
        outputs=[
            jax.ShapeDtypeStruct((rows, parts, width), jnp.float32),
            *[jax.ShapeDtypeStruct((rows, parts), jnp.float32)] * 2,
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old),
        ],
        grid=(parts, cdiv(width, block_e), rows),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        overwrite={len(inputs) - 2: 3, len(inputs) - 1: 4},
        M=capacity,
        S=inner,
        E=width,
        H=heads,
        SOFTMAX=softmax,
        BIAS=bias is not None,
        SPAN=span,
        PRECISION=PRECISION,
        BLOCK_M=tiles.block_m,
        BLOCK_S=power_of_two(inner),
        BLOCK_E=block_e,
    )
    block_e = min(power_of_two(width), tiles.block_sum)
    (o_BH1E,) = launch(
        kernels.add_parts_kernel,
        *(o_RXE, top_RX, total_RX),
        outputs=[jax.ShapeDtypeStruct(v_BH1E.shape, v_BH1E.dtype)],
        grid=(cdiv(width, block_e), rows),
        num_warps=tiles.num_warps,
        num_stages=1,
        PARTS=parts,
        E=width,
        SOFTMAX=softmax,
        BLOCK_X=min(power_of_two(parts), tiles.block_m),
        BLOCK_E=block_e,
    )
    o_BH1E = jnp.where((position.start_B < capacity)[:, None, None, None], o_BH1E, jnp.nan)
    return o_BH1E, {'k': k_BHMS, 'v': v_BHME}


def _scales(position: DecodePosition, scoring: Scoring, width: int) -> Array:
    """Returns the factors of each row on q.k and on weights, float32 [2, B]."""
    visible_B = (position.start_B + 1).astype(jnp.float32)
    ones_B = jnp.ones_like(visible_B)
    score_B = choose(
        None if scoring.function == 'softmax' else scoring.normalizer,
        {
            None: ones_B * width**-0.5,
            'fixed': ones_B / scoring.length,
            'visible': 1 / visible_B,
            'su': ones_B * width**-0.5,
        },
    )
    return jnp.stack([score_B, 1 / visible_B if scoring.normalizer == 'su' else ones_B])
