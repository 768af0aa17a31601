"""Triton kernels of the weights of one chunk on the other in a text of two chunks (`chunk_pairs` says what they are).

F is the width of q and k, S that of one part of it for each walk: with F = S the second chunk reads the first one, with
F = 2 S the first chunk reads the second one, too, with the columns from S on.
"""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, share_ptr, x_ptr,
    C: tl.constexpr, F: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """x = share q k^T, grid [C, C, chunks that read]."""
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    number = tl.program_id(2).to(tl.int64)
    # Of one walk every second chunk reads.
    chunk = number * 2 + 1 if F == S else number
    walk = 1 - chunk % 2
    q = tile(q_ptr + chunk * C * F + walk * S, i, s, F, C, S)
    k = tile(k_ptr + (chunk ^ 1) * C * F + walk * S, j, s, F, C, S)
    share = tl.load(share_ptr + chunk * (F // S) + walk)
    put(x_ptr + number * C * C, tl.dot(q, tl.trans(k), input_precision=PRECISION) * share, i, j, C, C, C)


@triton.jit
def gradient_kernel(
    q_ptr, k_ptr, share_ptr, dx_ptr, dq_ptr, dk_ptr,
    C: tl.constexpr, F: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq = share dx k of a chunk that reads, dk = share dx^T q of one that is read, grid [dq and dk, C, T]."""
    WALKS: tl.constexpr = F // S
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    of_keys = tl.program_id(0) == 1
    chunk = tl.program_id(2).to(tl.int64)
    # The chunk that reads, this one or the other. The first of two does so by the second walk, or not at all.
    reads = chunk ^ 1 if of_keys else chunk
    walk = (1 - reads % 2) * (WALKS - 1)
    number, end = reads, C
    if WALKS == 1:
        number, end = reads // 2, tl.where(reads % 2 == 1, C, 0)
    share = tl.load(share_ptr + reads * WALKS + walk)
    dx_ptr += number * C * C
    factor_ptr = tl.where(of_keys, q_ptr, k_ptr) + (chunk ^ 1) * C * F + walk * S
    result_ptr = tl.where(of_keys, dk_ptr, dq_ptr) + chunk * C * F
    sum = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    if of_keys:
        for start in range(0, end, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            dx = tile(dx_ptr, c, m, C, C, C)
            sum = tl.dot(tl.trans(dx), tile(factor_ptr, c, s, F, C, S), sum, input_precision=PRECISION)
    else:
        for start in range(0, end, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            dx = tile(dx_ptr, m, c, C, C, C)
            sum = tl.dot(dx, tile(factor_ptr, c, s, F, C, S), sum, input_precision=PRECISION)
    for other in tl.static_range(WALKS):
        put(result_ptr + other * S, tl.where(other == walk, sum * share, 0.0), m, s, F, C, S)
