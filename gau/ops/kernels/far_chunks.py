"""Exact attention to chosen earlier chunks on a GPU, a part of the gated chunk matmul (`gau.ops.kernels.gated_chunks`).

The op is `gau.ops.far_chunks`. The choice is the compiler's, and so is the sum of keys and mean key: both are narrow.
Kernels read the chosen chunks where they lie, through their index. Letters beside those of the op: R, how many chunks a
chunk reads at most, its places; P = G R, the pairs of a sequence, each a chunk and one that it reads.

The weights are written down, forwards and backwards, since E is wide: a program that made weights and output together
would have no room for whole rows of it, and make the weights again for each of its tiles, E / 256 of them. They are not
kept in between: the kernel of their gradient would have to read them, and makes them instead, for the gradient of the
values, from q, k and the log of each query's sum, a twelfth of its matmul. As many bytes are moved, and none are held.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.far_chunks import choose_chunks
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import PairScoresTiles, cdiv, fit, power_of_two


class Far(NamedTuple):
    """Which earlier chunks are read, and with what.

    Attributes:
      q_BGCS: queries, bfloat16 or float32 as keys and values.
      k_BGCS: keys, the mean key of their chunk added.
      ids_BGC: segment ids of documents that are contiguous; int32, as what follows.
      index_BGR: which chunks a chunk reads, R of them at most.
      count_BG: how many it reads; the places behind them may hold any chunk.
    """

    q_BGCS: Array
    k_BGCS: Array
    ids_BGC: Array
    index_BGR: Array
    count_BG: Array


def choose(q_BGCS: Array, k_BGCS: Array, ids_BGC: Array, chunks: int) -> Far | None:
    """Returns which chunks are read, `chunks` of them at most; None where there is a single one.

    Args:
      q_BGCS: queries.
      k_BGCS: keys, without the mean.
      ids_BGC: segment ids, [B, G, C] or [1, G, C].
      chunks: how many chunks are read, at least 1.
    """
    groups = q_BGCS.shape[1]
    if groups == 1:
        return None
    ids_BGC = jnp.broadcast_to(ids_BGC, q_BGCS.shape[:3]).astype(jnp.int32)
    k_BGCS, index_BGR, found_BGR = choose_chunks(q_BGCS, k_BGCS, ids_BGC, min(chunks, groups - 1))
    return Far(q_BGCS, k_BGCS, ids_BGC, index_BGR.astype(jnp.int32), found_BGR.sum(-1, dtype=jnp.int32))


def attend(far: Far, v_BGCE: Array) -> tuple[Array, Array]:
    """Returns what the queries of every chunk read, [B, G, C, E], zeros where that is nothing, and log sums to keep.

    These are log(1 + sum of exp(q.k / sqrt(S)) over all keys that a query reads), [B, G, C] in float32.
    """
    a_BGRCC, log_sum_BGC = _weights(far)
    return _sum_over_read(a_BGRCC, v_BGCE, far), log_sum_BGC


def gradients(far: Far, v_BGCE: Array, log_sum_BGC: Array, do_BGCE: Array) -> tuple[Far, Array]:
    """Returns the gradients of queries and keys, and of the values, of what `attend` returned."""
    a_BGRCC, ds_BGRCC = _weights_and_gradient(far, log_sum_BGC, v_BGCE, do_BGCE)
    readers = readers_of_chunks(far.index_BGR, far.count_BG)
    dq_BGCS, dk_BGCS = _sum_over_read(ds_BGRCC, far.k_BGCS, far), _sum_over_readers(ds_BGRCC, far.q_BGCS, readers)
    return Far(dq_BGCS, dk_BGCS, None, None, None), _sum_over_readers(a_BGRCC, do_BGCE, readers)


def readers_of_chunks(index_BGR: Array, count_BG: Array) -> tuple[Array, Array]:
    """Returns the pairs g R + r by the chunk that they read, and where those of each chunk start.

    Args:
      index_BGR: which chunks a chunk reads.
      count_BG: how many it reads, the first of these places.

    Returns:
      order [B, G R], int32: the pairs of a sequence, those of chunk i from starts[i] to starts[i + 1], each after those
      of earlier chunks; starts [B, G + 1], int32.
    """
    batch, groups, read = index_BGR.shape
    # Pairs without a chunk come last.
    chunk_BGR = jnp.where(jnp.arange(read) < count_BG[..., None], index_BGR, groups)
    chunk_BP = chunk_BGR.reshape(batch, -1)
    before_BIP = chunk_BP[:, None] < jnp.arange(groups + 1)[:, None]
    return jnp.argsort(chunk_BP, axis=-1).astype(jnp.int32), before_BIP.sum(-1, dtype=jnp.int32)


def _weights(far: Far) -> list[Array]:
    """Returns the weights of all pairs, [B, G, R, C, C] in the type of q, and the log sums."""
    from gau.ops.kernels.far_chunks_triton import weights_kernel

    batch, groups, size, width = far.q_BGCS.shape
    tiles = fit(tile_sizes.FAR_WEIGHTS[str(far.q_BGCS.dtype)], block_m=size, block_n=size)
    pairs = _pairs(far)
    return launch(
        weights_kernel,
        *far,
        outputs=[pairs, jax.ShapeDtypeStruct((batch, groups, size), jnp.float32)],
        grid=(cdiv(size, tiles.block_m), batch * groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        S=width,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_S=power_of_two(width),
        SCALE=width**-0.5,
        **_sizes(pairs),
    )


def _sum_over_read(a_BGRCC: Array, x_BGCE: Array, far: Far) -> Array:
    """Returns a x of the chunks that each chunk reads, [B, G, C, E]."""
    from gau.ops.kernels.far_chunks_triton import sum_over_read_kernel

    return _sum(sum_over_read_kernel, a_BGRCC, x_BGCE, far.index_BGR, far.count_BG)


def _sum_over_readers(a_BGRCC: Array, x_BGCE: Array, readers: tuple[Array, Array]) -> Array:
    """Returns a^T x of the chunks that read each chunk, [B, G, C, E]; see `readers_of_chunks`."""
    from gau.ops.kernels.far_chunks_triton import sum_over_readers_kernel

    return _sum(sum_over_readers_kernel, a_BGRCC, x_BGCE, *readers)


def _sum(kernel: Any, a_BGRCC: Array, x_BGCE: Array, *which: Array) -> Array:
    batch, groups, size, width = x_BGCE.shape
    tiles = tile_sizes.far_sum_tiles(width, str(x_BGCE.dtype))
    tiles = fit(tiles, block_m=size, block_k=size, block_e=width)
    return launch(
        kernel,
        *(a_BGRCC, x_BGCE, *which),
        outputs=[jax.ShapeDtypeStruct(x_BGCE.shape, x_BGCE.dtype)],
        grid=(cdiv(size, tiles.block_m), cdiv(width, tiles.block_e), batch * groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        E=width,
        BLOCK_M=tiles.block_m,
        BLOCK_K=tiles.block_k,
        BLOCK_E=tiles.block_e,
        **_sizes(a_BGRCC),
    )[0]


def _weights_and_gradient(far: Far, log_sum_BGC: Array, v_BGCE: Array, do_BGCE: Array) -> tuple[Array, Array]:
    """Returns the weights and the gradient of q.k of all pairs, [B, G, R, C, C] each in the type of q."""
    size, read = far.q_BGCS.shape[2], far.index_BGR.shape[-1]
    tiles = fit(tile_sizes.FAR_SCORES_GRADIENT[str(far.q_BGCS.dtype)], side=size)
    a_BGRCC, part_BGRCC, sums_BGRT2C = _scores_gradient(far, tiles, log_sum_BGC, v_BGCE, do_BGCE)
    # The sum of a da over all keys of a query would be that of do o as well. But o is rounded, and its weights are:
    # what all da have in common would not cancel, and o would have to be kept. Of pairs without a chunk nothing is
    # written.
    there_BGR = jnp.arange(read) < far.count_BG[..., None]
    total_BGRTC, weighted_BGRTC = jnp.moveaxis(jnp.where(there_BGR[..., None, None, None], sums_BGRT2C, 0), 4, 0)
    delta_BG11C = weighted_BGRTC.sum((2, 3), keepdims=True)
    shift_BGRTC = (weighted_BGRTC / jnp.maximum(total_BGRTC, 1e-30) - delta_BG11C) * far.q_BGCS.shape[-1] ** -0.5
    shift_BGRCC = jnp.repeat(shift_BGRTC.swapaxes(3, 4), tiles.side, axis=4)[..., :size]
    return a_BGRCC, (part_BGRCC.astype(jnp.float32) + a_BGRCC.astype(jnp.float32) * shift_BGRCC).astype(a_BGRCC.dtype)


def _scores_gradient(far: Far, tiles: PairScoresTiles, *more: Array) -> list[Array]:
    """Launches `scores_gradient_kernel`; more are the log sums, v and the gradient of o."""
    from gau.ops.kernels.far_chunks_triton import scores_gradient_kernel

    batch, groups, size, width = far.q_BGCS.shape
    pairs, across = _pairs(far), cdiv(size, tiles.side)
    return launch(
        scores_gradient_kernel,
        *(*far, *more),
        outputs=[pairs, pairs, jax.ShapeDtypeStruct((*pairs.shape[:3], across, 2, size), jnp.float32)],
        grid=(across**2, far.index_BGR.shape[-1], batch * groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        S=width,
        E=more[-1].shape[-1],
        SIDE=tiles.side,
        INNER=tiles.inner,
        BLOCK_S=power_of_two(width),
        SCALE=width**-0.5,
        **_sizes(pairs),
    )


def _pairs(far: Far) -> jax.ShapeDtypeStruct:
    batch, groups, size, _ = far.q_BGCS.shape
    return jax.ShapeDtypeStruct((batch, groups, far.index_BGR.shape[-1], size, size), far.q_BGCS.dtype)


def _sizes(pairs_BGRCC: Array | jax.ShapeDtypeStruct) -> dict:
    """Returns the constants that all kernels have."""
    _, groups, read, size, _ = pairs_BGRCC.shape
    return {'G': groups, 'C': size, 'READ': read, 'PRECISION': 'ieee'}
