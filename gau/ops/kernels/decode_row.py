"""One token of one sequence in a FLASH layer: one kernel, whose programs run together and wait for each other.

See `gau.ops.kernels.decode_chunks`, which calls it for a batch of one row.
"""

from typing import Any

import jax
from jax import Array

from gau.ops.decoding import State
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import interpreted, launch, streaming_multiprocessors
from gau.ops.kernels.tile_sizes import DecodeRowTiles, cdiv, power_of_two
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.norms import NORM_EPSILON


def row_programs(width: int, expanded: int, inner: int, tiles: DecodeRowTiles) -> tuple[int, int]:
    """Returns the first program that has a tile of z, and how many programs there are."""
    first_z = 0 if interpreted() else cdiv(2 * expanded, tiles.block_n)
    most = first_z + cdiv((inner + 1) // 2, tiles.block_h)
    return first_z, max(most, cdiv(expanded, tiles.block_e), cdiv(width, tiles.block_d))


def row_tiles(width: int, expanded: int, inner: int) -> DecodeRowTiles | None:
    """Returns the tiles of a layer with D, E and S; None where they would not fit into a program's registers, or its
    programs not on this GPU together.
    """
    tiles = tile_sizes.DECODE_ROW
    if max(power_of_two(width), power_of_two(expanded) // 2, power_of_two(inner) * 8) > tiles.most:
        return None
    if interpreted():
        # Programs run one after the other there: one has it all.
        sides = {'block_n': 2 * expanded, 'block_h': inner, 'block_e': expanded, 'block_d': width}
        return tiles._replace(**{name: power_of_two(side) for name, side in sides.items()})
    return tiles if row_programs(width, expanded, inner, tiles)[1] <= streaming_multiprocessors() else None


def decode_row(
    x_1D: Array,
    parameters: Any,
    table: tuple[Array, Array],
    window: State,
    *,
    place_3: Array,
    scales: Array,
    spec: ChunkSpec,
    tiles: DecodeRowTiles,
) -> tuple[Array, State]:
    """Returns x + GAU(ScaleNorm(x)) of a token, [1, D], and the new window.

    Args:
      x_1D: the residual stream.
      parameters: `gau.ops.kernels.decode_chunks.Parameters`.
      table: cosines and sines, float32 [1, S / 2], or None.
      window: `k`, `k_lin`, `v`, `sum` and `arrivals` of one row and head (`gau.ops.chunk_window`); with shifted keys
        `before`, with a gate `gate` and `count`, with several far chunks `far_k` and so on.
      place_3: the token's place in the window, behind its end: nowhere; the first place of the sequence; and the
        token's place in the sequence.
      scales: factors, float32 [3, 1].
      spec: that of `decode_gated_chunks`.
      tiles: of `row_tiles`.
    """
    from gau.ops.kernels import decode_row_triton as kernels

    (_, width), dtype = x_1D.shape, x_1D.dtype
    places, expanded = window['v'].shape[1:]
    inner = parameters.z_DS.shape[1]
    first_z, programs = row_programs(width, expanded, inner, tiles)
    p, none, shifted, gated = parameters, parameters.norm, parameters.mix_S is not None, parameters.gate_D is not None
    # What is not there has a pointer all the same.
    far = ('far_k', 'far_v', 'far_mean', 'far_query', 'far_next')
    old = {name: window.get(name, none) for name in ('v', 'k', 'k_lin', 'arrivals', 'before', 'gate', *far)}
    kept, chosen = (window['far_k'].shape[1], window['far_index'].shape[1]) if 'far_k' in window else (0, 0)
    inputs = (
        *(x_1D, p.norm, p.uv_D2E, p.uv_bias_2E, p.z_DS, p.z_bias_S, p.gamma_RS, p.beta_RS, *(table or (none, none))),
        *(p.out_ED, p.out_bias_D, window['sum'], none if p.bias_P is None else p.bias_P, place_3, scales),
        *(p.mix_S if shifted else none, *((p.gate_D, p.gate_bias, window['count']) if gated else (none,) * 3)),
        window.get('far_index', none),
    )
    y_1D, *new = launch(
        kernels.decode_row_kernel,
        *inputs,
        *old.values(),
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (x_1D, *old.values())]
        + [jax.ShapeDtypeStruct(shape, dtype) for shape in ((expanded,), (3, inner), (expanded,))],
        grid=(programs,),
        num_warps=tiles.num_warps,
        num_stages=1,
        overwrite={len(inputs) + number: 1 + number for number, name in enumerate(old) if name in window},
        D=width,
        E=expanded,
        S=inner,
        C=spec.chunk_size,
        PLACES=places,
        FAR=kept,
        R=chosen,
        ROPE=table is not None,
        BIAS=p.bias_P is not None,
        SHIFTED=shifted,
        NEAR=spec.window,
        GATED=gated,
        MEAN=spec.mean,
        EPSILON=NORM_EPSILON,
        PROGRAMS=programs,
        FIRST_Z=first_z,
        BLOCK_K=power_of_two(width),
        BLOCK_N=tiles.block_n,
        BLOCK_H=tiles.block_h,
        BLOCK_S=power_of_two(inner),
        BLOCK_W=min(power_of_two(places), tiles.block_w),
        BLOCK_E=tiles.block_e,
        BLOCK_I=power_of_two(expanded),
        BLOCK_D=tiles.block_d,
        BLOCK_C=power_of_two(spec.chunk_size),
        FAR_W=min(power_of_two(spec.chunk_size), tiles.far_w),
        BLOCK_R=power_of_two(max(1, chosen)),
    )
    return y_1D, window | {name: x for name, x in zip(old, new, strict=False) if name in window}
