"""Triton kernel of the gradient of queries and keys in windows of two chunks (`window_weights` says what they are).

Bytes are of size base (S = 128, C = 128) with 65,536 tokens in bfloat16.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def gradient_kernel(
    q_ptr, k_ptr, ds_ptr, dq_ptr, dk_ptr,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq[g] = ds[g] [k[g - 1]; k[g]], dk[g] = ds[g]^T q[g] of the own half of ds, + ds[g + 1]^T q[g + 1] of the other.

    Grid    [dq and dk, C / BLOCK_M, B G]
    Tile    dq or dk [BLOCK_M, S], sums in steps of BLOCK_K
    Reads   q and k [B, G, C, S]; ds [B, G, C, 2 C], on the own chunk zero above the diagonal
    Writes  dq and dk [B, G, C, S]
    Bytes   101 MB a layer: q, k, ds; dq, dk
    """
    first = tl.program_id(1) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    chunk = tl.program_id(2).to(tl.int64)
    ds_ptr += chunk * C * 2 * C
    sum = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    if tl.program_id(0) == 0:
        begin = tl.where(chunk % G > 0, 0, C)
        for start in range(begin, C + tl.minimum(first + BLOCK_M, C), BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            ds = load_tile(ds_ptr, m, j, 2 * C, C, 2 * C)  # [BM, BK]
            k = load_tile(k_ptr + (chunk - 1) * C * S, j, s, S, 2 * C, S)  # [BK, BS]
            # [BM, BK] @ [BK, BS]
            sum = tl.dot(ds, k, sum, input_precision=PRECISION)
        store_tile(dq_ptr + chunk * C * S, sum, m, s, S, C, S)
    else:
        # The tokens of the next chunk come after those of this one.
        end = tl.where(chunk % G < G - 1, 2 * C, C)
        for start in range(first, end, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            # Each token has two rows of C weights: of them the second is on its own chunk, the first on that before.
            ds = load_tile(ds_ptr, 2 * i + (i < C), m, C, 2 * end, C)  # [BK, BM]
            q = load_tile(q_ptr + chunk * C * S, i, s, S, end, S)  # [BK, BS]
            # [BM, BK] @ [BK, BS]
            sum = tl.dot(tl.trans(ds), q, sum, input_precision=PRECISION)
        store_tile(dk_ptr + chunk * C * S, sum, m, s, S, C, S)
