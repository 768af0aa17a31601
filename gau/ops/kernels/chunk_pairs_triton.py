"""Triton kernels of the weights of one chunk on the other in a sequence of two (`chunk_pairs` says what they are).

F is the width of q and k, S that of the part for one direction: with F = S the second chunk reads the first one; with
F = 2 S the first chunk reads the second one, too, with the columns from S on.

Bytes are of size base (S = 128, C = 256), causal, with 65,536 tokens in bfloat16 in sequences of 512.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, state_scale_ptr, x_ptr,
    C: tl.constexpr, F: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """x = state_scale q k^T, q of a chunk that reads and k of the other one.

    Grid    [C / BLOCK_N, C / BLOCK_M, chunks that read]
    Tile    x [BLOCK_M, BLOCK_N], all of S at once
    Reads   q and k [B, 2, C, F], state_scale [B, 2, J]
    Writes  x [B, J, C, C]
    Bytes   34 MB a layer: half of q, half of k, x
    """
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    number = tl.program_id(2).to(tl.int64)
    # With one direction every second chunk reads.
    chunk = number * 2 + 1 if F == S else number
    direction = 1 - chunk % 2
    q = load_tile(q_ptr + chunk * C * F + direction * S, i, s, F, C, S)  # [BM, BS]
    k = load_tile(k_ptr + (chunk ^ 1) * C * F + direction * S, j, s, F, C, S)  # [BN, BS]
    state_scale = tl.load(state_scale_ptr + chunk * (F // S) + direction)
    x_ptr += number * C * C
    # [BM, BS] @ [BS, BN]
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * state_scale
    store_tile(x_ptr, x, i, j, C, C, C)


@triton.jit
def gradient_kernel(
    q_ptr, k_ptr, state_scale_ptr, dx_ptr, dq_ptr, dk_ptr,
    C: tl.constexpr, F: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq = state_scale dx k of a chunk that reads, dk = state_scale dx^T q of one that is read; else zeros.

    Grid    [dq and dk, C / BLOCK_M, B G]
    Tile    dq or dk [BLOCK_M, S], sums in steps of BLOCK_K
    Reads   q and k [B, 2, C, F], state_scale [B, 2, J], dx [B, J, C, C]
    Writes  dq and dk [B, 2, C, F], every column
    Bytes   67 MB a layer: half of q, half of k, dx; dq, dk
    """
    DIRECTIONS: tl.constexpr = F // S
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    of_keys = tl.program_id(0) == 1
    chunk = tl.program_id(2).to(tl.int64)
    # The chunk that reads, this one or the other. The first of two does so in the second direction, or not at all.
    reader = chunk ^ 1 if of_keys else chunk
    direction = (1 - reader % 2) * (DIRECTIONS - 1)
    number, end = reader, C
    if DIRECTIONS == 1:
        number, end = reader // 2, tl.where(reader % 2 == 1, C, 0)
    state_scale = tl.load(state_scale_ptr + reader * DIRECTIONS + direction)
    dx_ptr += number * C * C
    factor_ptr = tl.where(of_keys, q_ptr, k_ptr) + (chunk ^ 1) * C * F + direction * S
    result_ptr = tl.where(of_keys, dk_ptr, dq_ptr) + chunk * C * F
    sum = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    if of_keys:
        for start in range(0, end, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            dx = load_tile(dx_ptr, c, m, C, C, C)  # [BK, BM]
            q = load_tile(factor_ptr, c, s, F, C, S)  # [BK, BS]
            # [BM, BK] @ [BK, BS]
            sum = tl.dot(tl.trans(dx), q, sum, input_precision=PRECISION)
    else:
        for start in range(0, end, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            dx = load_tile(dx_ptr, m, c, C, C, C)  # [BM, BK]
            k = load_tile(factor_ptr, c, s, F, C, S)  # [BK, BS]
            # [BM, BK] @ [BK, BS]
            sum = tl.dot(dx, k, sum, input_precision=PRECISION)
    for other in tl.static_range(DIRECTIONS):
        store_tile(result_ptr + other * S, tl.where(other == direction, sum * state_scale, 0.0), m, s, F, C, S)
