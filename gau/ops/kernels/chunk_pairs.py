"""Weights of one chunk on the other in a text of two, on a GPU: what its states would give, without states.

The first walk of `gau.ops.gated_chunks.gated_chunk_product` carries what the first chunk adds to the second, which
reads it; a second walk goes from the second chunk to the first. So a chunk that reads has weights x = share q k^T, with
the columns of q and k of its walk, and the chunks that read are as many as walks: the second chunk, or both.
"""

import jax
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two

# Of the weights the sides of a tile, of their gradient rows and inner dimension; then warps and pipeline stages. The
# fastest of half a dozen each on an H100.
TILES = {
    'bfloat16': ((64, 64, 4, 1), (128, 64, 8, 3)),
    'float32': ((32, 32, 4, 1), (32, 32, 4, 1)),
}


def weights_on_other_chunk(q_BGCF: Array, k_BGCF: Array, share_BGP: Array) -> Array:
    """Returns x [B, P, C, C] in the type of q, for the chunks that read, in their order; share is float32."""
    from gau.ops.kernels.chunk_pairs_triton import weights_kernel

    (batch, _, size, _), walks = q_BGCF.shape, share_BGP.shape[-1]
    rows, columns, num_warps, num_stages = TILES[str(q_BGCF.dtype)][0]
    rows, columns = min(rows, power_of_two(size)), min(columns, power_of_two(size))
    return launch(
        weights_kernel,
        *(q_BGCF, k_BGCF, share_BGP),
        outputs=[jax.ShapeDtypeStruct((batch, walks, size, size), q_BGCF.dtype)],
        grid=(-(-size // columns), -(-size // rows), batch * walks),
        num_warps=num_warps,
        num_stages=num_stages,
        **_sizes(q_BGCF, share_BGP),
        BLOCK_M=rows,
        BLOCK_N=columns,
    )[0]


def gradients_of_queries_and_keys(q_BGCF: Array, k_BGCF: Array, share_BGP: Array, dx_BPCC: Array) -> list[Array]:
    """Returns the gradients of q and k, zeros for what no chunk reads."""
    from gau.ops.kernels.chunk_pairs_triton import gradient_kernel

    batch, groups, size, _ = q_BGCF.shape
    rows, inner, num_warps, num_stages = TILES[str(q_BGCF.dtype)][1]
    rows = min(rows, power_of_two(size))
    return launch(
        gradient_kernel,
        *(q_BGCF, k_BGCF, share_BGP, dx_BPCC),
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BGCF, k_BGCF)],
        grid=(2, -(-size // rows), batch * groups),
        num_warps=num_warps,
        num_stages=num_stages,
        **_sizes(q_BGCF, share_BGP),
        BLOCK_M=rows,
        BLOCK_K=inner,
    )


def _sizes(q_BGCF: Array, share_BGP: Array) -> dict:
    inner, walks = q_BGCF.shape[-1], share_BGP.shape[-1]
    state = inner // walks
    return {
        'C': q_BGCF.shape[2],
        'F': inner,
        'S': state,
        'BLOCK_S': power_of_two(state),
        'PRECISION': 'ieee',
    }
