"""Triton kernels of the ScaleNorm of the residual stream. A row is one token of the batch, ROWS in all.

Arrays of [ROWS, D] are read and written once; at size base, 65,536 tokens in bfloat16, one has 101 MB.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def scale_norm_kernel(
    x_ptr, bias_ptr, g_ptr, w_ptr, h_ptr, logit_ptr,
    BIAS: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h = s g / rms(s) for s = x + bias; if GATE also h.w.

    Grid    [ROWS / BLOCK_R]
    Tile    [BLOCK_R, D], whole rows
    Reads   x [ROWS, D], bias [D] if BIAS, g, w [D] if GATE
    Writes  h [ROWS, D]; logit [ROWS] if GATE, float32
    Bytes   2 arrays of [ROWS, D] a norm
    """
    rows: tl.constexpr = None if ROWS % BLOCK_R == 0 else ROWS
    cols: tl.constexpr = None if D == BLOCK_D else D
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    s = load_tile(x_ptr, row, d, D, rows, cols).to(tl.float32)  # [BR, BD]
    if BIAS:
        s += load_tile(bias_ptr, tl.arange(0, 1), d, D, None, cols)  # [1, BD]
    r = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + EPSILON)  # [BR]
    h = (s * (tl.load(g_ptr) * r)[:, None]).to(h_ptr.dtype.element_ty)
    store_tile(h_ptr, h, row, d, D, rows, cols)
    if GATE:
        w = load_tile(w_ptr, tl.arange(0, 1), d, D, None, cols).to(tl.float32)  # [1, BD]
        tl.store(logit_ptr + row, tl.sum(h.to(tl.float32) * w, axis=1), mask=row < ROWS)


@triton.jit
def scale_norm_gradient_kernel(
    x_ptr, bias_ptr, g_ptr, w_ptr, dresidual_ptr, dh_ptr, dlogit_ptr, dx_ptr, sums_ptr,
    BIAS: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ds = gradient of h = s g / rms(s) for s = x + bias, dx = dresidual + ds, dbias = sum of ds, dg = sum of dh s/rms.

    If GATE, dh is the given one + dlogit w, and dw = sum of dlogit h.

    A program takes every tile of rows whose number is its own plus a multiple of the programs, and has its sums in
    registers, one for each place in a tile: only the last step sums over the rows of a tile, which takes shuffles.

    Grid    [programs], as many as the GPU runs at once
    Tile    [BLOCK_R, D], whole rows
    Reads   x, dresidual and dh [ROWS, D], bias [D] if BIAS, g; w [D] and dlogit [ROWS] if GATE
    Writes  dx [ROWS, D]; sums [programs, D (BIAS + GATE) + 1], a program's part of dbias, of dw, and of dg
    Bytes   4 arrays of [ROWS, D] a norm
    """
    rows: tl.constexpr = None if ROWS % BLOCK_R == 0 else ROWS
    cols: tl.constexpr = None if D == BLOCK_D else D
    d = tl.arange(0, BLOCK_D)
    g = tl.load(g_ptr)
    dg = tl.zeros((BLOCK_R,), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if BIAS and not GATE:
        bias = load_tile(bias_ptr, tl.arange(0, 1), d, D, None, cols)  # [1, BD]
    dw = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_R, ROWS, tl.num_programs(0) * BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        s = load_tile(x_ptr, row, d, D, rows, cols).to(tl.float32)  # [BR, BD]
        if BIAS:
            if GATE:
                # From the cache for every tile, as w is: the sums of dw need the registers.
                s += load_tile(bias_ptr, tl.arange(0, 1), d, D, None, cols)  # [1, BD]
            else:
                s += bias
        dh = load_tile(dh_ptr, row, d, D, rows, cols).to(tl.float32)  # [BR, BD]
        dresidual = load_tile(dresidual_ptr, row, d, D, rows, cols).to(tl.float32)  # [BR, BD]
        r = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + EPSILON)  # [BR]
        if GATE:
            dlogit = tl.load(dlogit_ptr + row, mask=row < ROWS, other=0.0)[:, None]  # [BR, 1]
            dw += dlogit * (s * (g * r)[:, None]).to(dh_ptr.dtype.element_ty).to(tl.float32)
            dh += dlogit * load_tile(w_ptr, tl.arange(0, 1), d, D, None, cols).to(tl.float32)  # [1, BD]
        along = tl.sum(dh * s, axis=1)  # [BR]
        ds = (g * r)[:, None] * dh - (g * r * r * r * along / D)[:, None] * s
        dg += along * r
        if BIAS:
            # A row outside is no token: there s is the bias, but dh is 0.
            dbias += ds
        store_tile(dx_ptr, dresidual + ds, row, d, D, rows, cols)
    WIDTH: tl.constexpr = D * (BIAS + GATE) + 1
    sums_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    if BIAS:
        store_tile(sums_ptr, tl.sum(dbias, axis=0)[None, :], tl.arange(0, 1), d, D, None, cols)
    if GATE:
        store_tile(sums_ptr + D * BIAS, tl.sum(dw, axis=0)[None, :], tl.arange(0, 1), d, D, None, cols)
    tl.store(sums_ptr + WIDTH - 1, tl.sum(dg, axis=0))


@triton.jit
def row_scales(
    x_ptr, g_ptr, scales_ptr, row, R: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns g / rms of each of these rows of x [R, D]: ScaleNorm is one factor for a row, taken after a matmul.

    If SCALED they have been found before, [R].
    """
    if SCALED:
        return tl.load(scales_ptr + row, mask=row < R, other=0.0)
    rows: tl.constexpr = None if R % BLOCK_M == 0 else R
    depth: tl.constexpr = None if D % (2 * BLOCK_K) == 0 else D
    squares = tl.zeros((BLOCK_M, 2 * BLOCK_K), tl.float32)
    for start in range(0, D, 2 * BLOCK_K):
        x = load_tile(x_ptr, row, start + tl.arange(0, 2 * BLOCK_K), D, rows, depth).to(tl.float32)  # [BM, 2 BK]
        squares += x * x
    return tl.load(g_ptr) / tl.sqrt(tl.sum(squares, axis=1) / D + EPSILON)
