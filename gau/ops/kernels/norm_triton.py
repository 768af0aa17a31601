"""Triton kernels of the residual stream's ScaleNorm. A row is one token of the batch."""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def scale_norm_kernel(
    x_ptr,
    bias_ptr,
    g_ptr,
    h_ptr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h = s g / rms(s) for s = x + bias, grid [rows]."""
    rows: tl.constexpr = None if ROWS % BLOCK_R == 0 else ROWS
    cols: tl.constexpr = None if D == BLOCK_D else D
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    s = tile(x_ptr, row, d, D, rows, cols).to(tl.float32)
    if BIAS:
        s += tile(bias_ptr, tl.arange(0, 1), d, D, None, cols)
    r = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + EPSILON)
    put(h_ptr, s * (tl.load(g_ptr) * r)[:, None], row, d, D, rows, cols)


@triton.jit
def scale_norm_gradient_kernel(
    x_ptr,
    bias_ptr,
    g_ptr,
    dstream_ptr,
    dh_ptr,
    dx_ptr,
    sums_ptr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ds = gradient of h = s g / rms(s), dx = dstream + ds, and a program's part of dbias [D] and dg; grid [programs].

    A program takes every tile of rows whose number is its own plus a multiple of the programs, and has its sums in
    registers, one for each place in a tile: only the last step sums over the rows of a tile, which takes shuffles.
    """
    rows: tl.constexpr = None if ROWS % BLOCK_R == 0 else ROWS
    cols: tl.constexpr = None if D == BLOCK_D else D
    d = tl.arange(0, BLOCK_D)
    g = tl.load(g_ptr)
    dg = tl.zeros((BLOCK_R,), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if BIAS:
        bias = tile(bias_ptr, tl.arange(0, 1), d, D, None, cols)
    for start in range(tl.program_id(0) * BLOCK_R, ROWS, tl.num_programs(0) * BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        s = tile(x_ptr, row, d, D, rows, cols).to(tl.float32)
        if BIAS:
            s += bias
        dh = tile(dh_ptr, row, d, D, rows, cols).to(tl.float32)
        dstream = tile(dstream_ptr, row, d, D, rows, cols).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + EPSILON)
        along = tl.sum(dh * s, axis=1)
        ds = (g * r)[:, None] * dh - (g * r * r * r * along / D)[:, None] * s
        dg += along * r
        if BIAS:
            # A row outside is no token: there s is the bias, but dh is 0.
            dbias += ds
        put(dx_ptr, dstream + ds, row, d, D, rows, cols)
    WIDTH: tl.constexpr = D * BIAS + 1
    sums_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    if BIAS:
        put(sums_ptr, tl.sum(dbias, axis=0)[None, :], tl.arange(0, 1), d, D, None, cols)
    tl.store(sums_ptr + WIDTH - 1, tl.sum(dg, axis=0))
