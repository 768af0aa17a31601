"""Weights of one chunk on the other in a sequence of two, on a GPU: what its states would give, without states.

The forward scan of `gau.ops.kernels.gated_chunks.gated_chunk_matmul` carries what the first chunk adds to the second,
which reads it; a reverse scan goes from the second chunk to the first. So a chunk that reads has weights
x = state_scale q k^T, with the columns of q and k of its scan, and there are as many such chunks as scans: the second
chunk, or both.
"""

import jax
from jax import Array

from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import cdiv, fit, power_of_two


def weights_on_other_chunk(q_BGCF: Array, k_BGCF: Array, state_scale_BGJ: Array) -> Array:
    """Returns x [B, J, C, C] in the type of q, for the chunks that read, in their order; state_scale is float32."""
    from gau.ops.kernels.chunk_pairs_triton import weights_kernel

    (batch, _, size, _), directions = q_BGCF.shape, state_scale_BGJ.shape[-1]
    tiles = fit(tile_sizes.PAIR_WEIGHTS[str(q_BGCF.dtype)], block_m=size, block_n=size)
    return launch(
        weights_kernel,
        *(q_BGCF, k_BGCF, state_scale_BGJ),
        outputs=[jax.ShapeDtypeStruct((batch, directions, size, size), q_BGCF.dtype)],
        grid=(cdiv(size, tiles.block_n), cdiv(size, tiles.block_m), batch * directions),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_sizes(q_BGCF, state_scale_BGJ),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
    )[0]


def gradients_of_queries_and_keys(q_BGCF: Array, k_BGCF: Array, state_scale_BGJ: Array, dx_BJCC: Array) -> list[Array]:
    """Returns the gradients of q and k, zeros for what no chunk reads."""
    from gau.ops.kernels.chunk_pairs_triton import gradient_kernel

    batch, groups, size, _ = q_BGCF.shape
    tiles = fit(tile_sizes.PAIR_GRADIENT[str(q_BGCF.dtype)], block_m=size)
    return launch(
        gradient_kernel,
        *(q_BGCF, k_BGCF, state_scale_BGJ, dx_BJCC),
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BGCF, k_BGCF)],
        grid=(2, cdiv(size, tiles.block_m), batch * groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_sizes(q_BGCF, state_scale_BGJ),
        BLOCK_M=tiles.block_m,
        BLOCK_K=tiles.block_k,
    )


def _sizes(q_BGCF: Array, state_scale_BGJ: Array) -> dict:
    inner, directions = q_BGCF.shape[-1], state_scale_BGJ.shape[-1]
    state = inner // directions
    return {
        'C': q_BGCF.shape[2],
        'F': inner,
        'S': state,
        'BLOCK_S': power_of_two(state),
        'PRECISION': 'ieee',
    }
