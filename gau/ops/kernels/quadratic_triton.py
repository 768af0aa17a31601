"""Triton kernels of quadratic attention with relu^2: from q.k to a block of weights, and back from their gradient.

The block [n, m] of the attention matrix is all of it that exists. `offset` is the place of the first query less that of
the first key; w holds the bias of all distances k - q from -(N - 1) to N - 1. Sizes are compile-time constants; tiles
that stick out are masked.
"""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def _scores(
    q_ptr, k_ptr, w_ptr, scale_ptr, query_ids_ptr, key_ids_ptr, offset, i, j, s, b,
    n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns relu(q.k * scale + w) where the key is seen, else 0, for the tile [i, j] of batch b (64 bits wide)."""
    q = tile(q_ptr + b * n * S, i, s, S, n, S)
    k = tile(k_ptr + b * m * S, j, s, S, m, S)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    x *= tl.load(scale_ptr + b * n + i, mask=i < n, other=0.0)[:, None]
    distance = j[None, :] - i[:, None] - offset
    inside = (i < n)[:, None] & (j < m)[None, :]
    if BIAS:
        x += tl.load(w_ptr + distance + N - 1, mask=inside, other=0.0)
    query_ids = tl.load(query_ids_ptr + b * n + i, mask=i < n, other=0)
    key_ids = tl.load(key_ids_ptr + b * m + j, mask=j < m, other=0)
    seen = inside & (query_ids[:, None] == key_ids[None, :]) & (key_ids > 0)[None, :]
    if CAUSAL:
        seen = seen & (distance <= 0)
    return tl.where(seen, tl.maximum(x, 0.0), 0.0)


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, w_ptr, scale_ptr, after_ptr, query_ids_ptr, key_ids_ptr, offset_ptr, a_ptr,
    n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """a = relu(q.k * scale + w)^2 * after, grid [m, n, B]."""
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    r = _scores(
        q_ptr, k_ptr, w_ptr, scale_ptr, query_ids_ptr, key_ids_ptr, tl.load(offset_ptr), i, j, tl.arange(0, BLOCK_S), b,
        n, m, S, N, CAUSAL, BIAS, PRECISION,
    )  # fmt: skip
    after = tl.load(after_ptr + b * n + i, mask=i < n, other=0.0)
    put(a_ptr + b * n * m, r * r * after[:, None], i, j, m, n, m)


@triton.jit
def weights_gradient_kernel(
    q_ptr, k_ptr, w_ptr, scale_ptr, after_ptr, query_ids_ptr, key_ids_ptr, offset_ptr, da_ptr, a_ptr, ds_ptr, db_ptr,
    B: tl.constexpr, n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, AGAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """ds = gradient of q.k, db = that of the bias summed over a part of the batch, and a once more if AGAIN.

    Grid [m, n, parts]. A program goes through its part of the batch, so that the sum over it stays in registers.
    """
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    offset = tl.load(offset_ptr)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(0, (B - part + parts - 1) // parts):
        b = part + number * parts
        r = _scores(
            q_ptr, k_ptr, w_ptr, scale_ptr, query_ids_ptr, key_ids_ptr, offset, i, j, tl.arange(0, BLOCK_S), b,
            n, m, S, N, CAUSAL, BIAS, PRECISION,
        )  # fmt: skip
        block = b * n * m
        after = tl.load(after_ptr + b * n + i, mask=i < n, other=0.0)[:, None]
        slope = tile(da_ptr + block, i, j, m, n, m).to(tl.float32) * 2 * r * after
        scale = tl.load(scale_ptr + b * n + i, mask=i < n, other=0.0)[:, None]
        if AGAIN:
            put(a_ptr + block, r * r * after, i, j, m, n, m)
        put(ds_ptr + block, slope * scale, i, j, m, n, m)
        db += slope
    if BIAS:
        put(db_ptr + part * n * m, db, i, j, m, n, m)
