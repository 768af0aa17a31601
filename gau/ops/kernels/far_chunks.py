"""Exact attention to chosen earlier chunks on a GPU: the fast path of `gau.ops.far_chunks`.

The choice is the compiler's, and so is the sum of keys and mean key: both are narrow. Kernels read the chosen chunks
where they lie, through their index. Letters beside those of the op: R, how many chunks a chunk reads at most, its
places; P = G R, the pairs of a sequence, each a chunk and one that it reads.

The weights are written down, forwards and backwards, since E is wide: a program that made weights and output together
would have no room for whole rows of it, and make the weights again for each of its tiles, E / 256 of them. They are not
kept in between: the kernel of their gradient would have to read them, and makes them instead, for the gradient of the
values, from q, k and the log of each query's sum, a twelfth of its matmul. As many bytes are moved, and none are held.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import into_chunks
from gau.ops.far_chunks import choose_chunks
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import cdiv, fit, power_of_two
from gau.ops.masks import clear_padding
from gau.ops.tracing import traced_once


@traced_once('chunk_size', 'chunks')
def far_chunks(
    q_BNS: Array,
    k_BNS: Array,
    v_BNE: Array,
    *,
    chunk_size: int,
    chunks: int,
    segment_ids_BN: Array | None = None,
) -> Array:
    """Returns what `gau.ops.far_chunks.far_chunks` does, in bfloat16 or float32, of documents that are contiguous."""
    q_BNS, k_BNS, v_BNE = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    batch, n, width = v_BNE.shape
    ids_BN = jnp.broadcast_to(1 if segment_ids_BN is None else segment_ids_BN, (batch, n)).astype(jnp.int32)
    q_BGCS, k_BGCS, v_BGCE, ids_BGC = (into_chunks(x, min(chunk_size, n)) for x in (q_BNS, k_BNS, v_BNE, ids_BN))
    chunks = min(chunks, v_BGCE.shape[1] - 1)
    if not chunks:
        return jnp.zeros_like(v_BNE)
    k_BGCS, index_BGR, found_BGR = choose_chunks(q_BGCS, k_BGCS, ids_BGC, chunks)
    count_BG = found_BGR.sum(-1, dtype=jnp.int32)
    o_BGCE = attend(q_BGCS, k_BGCS, v_BGCE, ids_BGC, index_BGR.astype(jnp.int32), count_BG)
    return clear_padding(o_BGCE.reshape(batch, -1, width)[:, :n], segment_ids_BN)


@jax.custom_vjp
def attend(q_BGCS: Array, k_BGCS: Array, v_BGCE: Array, ids_BGC: Array, index_BGR: Array, count_BG: Array) -> Array:
    """Returns what the queries of every chunk read, [B, G, C, E], zeros where that is nothing.

    Args:
      q_BGCS: queries, bfloat16 or float32 as the others.
      k_BGCS: keys, the mean key of their chunk added.
      v_BGCE: values.
      ids_BGC: segment ids; int32, as what follows.
      index_BGR: which chunks a chunk reads, R of them at most.
      count_BG: how many it reads; the places behind them may hold any chunk.
    """
    return _forward(q_BGCS, k_BGCS, v_BGCE, ids_BGC, index_BGR, count_BG)[0]


def _forward(q_BGCS, k_BGCS, v_BGCE, ids_BGC, index_BGR, count_BG):
    chosen = index_BGR, count_BG
    a_BGRCC, *sums = _weights(q_BGCS, k_BGCS, ids_BGC, *chosen)
    o_BGCE = _sum_over_read(a_BGRCC, v_BGCE, *chosen)
    return o_BGCE, (q_BGCS, k_BGCS, v_BGCE, ids_BGC, *chosen, *sums, o_BGCE)


def _backward(residuals, do_BGCE):
    q_BGCS, k_BGCS, v_BGCE, ids_BGC, *chosen, log_sum_BGC, rounding_BGC, o_BGCE = residuals
    # Of a softmax, the sum of the weights times their gradients; the value of the 1 is zero. What all gradients of a
    # query have in common cancels against weights with the sum that they had before they were rounded.
    delta_BGC = jnp.sum(do_BGCE.astype(jnp.float32) * o_BGCE.astype(jnp.float32), -1) * rounding_BGC
    more = log_sum_BGC, delta_BGC, v_BGCE, do_BGCE
    a_BGRCC, ds_BGRCC = _scores_gradient(q_BGCS, k_BGCS, ids_BGC, *chosen, *more)
    readers = readers_of_chunks(*chosen)
    dq_BGCS, dk_BGCS = _sum_over_read(ds_BGRCC, k_BGCS, *chosen), _sum_over_readers(ds_BGRCC, q_BGCS, *readers)
    return dq_BGCS, dk_BGCS, _sum_over_readers(a_BGRCC, do_BGCE, *readers), None, None, None


attend.defvjp(_forward, _backward)


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


def _weights(q_BGCS, k_BGCS, ids_BGC, index_BGR, count_BG) -> list[Array]:
    """Returns the weights of all pairs, [B, G, R, C, C] in the type of q, the log of their sums, and their rounding."""
    from gau.ops.kernels.far_chunks_triton import weights_kernel

    (batch, groups, size, width), read = q_BGCS.shape, index_BGR.shape[-1]
    tiles = fit(tile_sizes.FAR_WEIGHTS[str(q_BGCS.dtype)], block_m=size, block_n=size)
    pairs = jax.ShapeDtypeStruct((batch, groups, read, size, size), q_BGCS.dtype)
    by_query = jax.ShapeDtypeStruct((batch, groups, size), jnp.float32)
    return launch(
        weights_kernel,
        *(q_BGCS, k_BGCS, ids_BGC, index_BGR, count_BG),
        outputs=[pairs, by_query, by_query],
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


def _sum_over_read(a_BGRCC: Array, x_BGCE: Array, index_BGR: Array, count_BG: Array) -> Array:
    """Returns a x of the chunks that each chunk reads, [B, G, C, E]."""
    from gau.ops.kernels.far_chunks_triton import sum_over_read_kernel

    return _sum(sum_over_read_kernel, a_BGRCC, x_BGCE, index_BGR, count_BG)


def _sum_over_readers(a_BGRCC: Array, x_BGCE: Array, order_BP: Array, starts_BI: Array) -> Array:
    """Returns a^T x of the chunks that read each chunk, [B, G, C, E]; see `readers_of_chunks`."""
    from gau.ops.kernels.far_chunks_triton import sum_over_readers_kernel

    return _sum(sum_over_readers_kernel, a_BGRCC, x_BGCE, order_BP, starts_BI)


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


def _scores_gradient(
    q_BGCS, k_BGCS, ids_BGC, index_BGR, count_BG, log_sum_BGC, delta_BGC, v_BGCE, do_BGCE
) -> list[Array]:
    """Returns the weights and the gradient of q.k of all pairs, [B, G, R, C, C] each in the type of q."""
    from gau.ops.kernels.far_chunks_triton import scores_gradient_kernel

    (batch, groups, size, width), read = q_BGCS.shape, index_BGR.shape[-1]
    tiles = fit(tile_sizes.FAR_SCORES_GRADIENT[str(q_BGCS.dtype)], side=size)
    pairs = jax.ShapeDtypeStruct((batch, groups, read, size, size), q_BGCS.dtype)
    return launch(
        scores_gradient_kernel,
        *(q_BGCS, k_BGCS, ids_BGC, index_BGR, count_BG, log_sum_BGC, delta_BGC, v_BGCE, do_BGCE),
        outputs=[pairs, pairs],
        grid=(cdiv(size, tiles.side) ** 2, read, batch * groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        S=width,
        E=v_BGCE.shape[-1],
        SIDE=tiles.side,
        INNER=tiles.inner,
        BLOCK_S=power_of_two(width),
        SCALE=width**-0.5,
        **_sizes(pairs),
    )


def _sizes(pairs_BGRCC: Array | jax.ShapeDtypeStruct) -> dict:
    """Returns the constants that all kernels have."""
    _, groups, read, size, _ = pairs_BGRCC.shape
    return {'G': groups, 'C': size, 'READ': read, 'PRECISION': 'ieee'}
