"""Triton kernels of the residual sum and ScaleNorm. A row is one token of the batch."""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def add_and_scale_norm_kernel(
    x_ptr,
    y_ptr,
    bias_ptr,
    g_ptr,
    s_ptr,
    h_ptr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """s = x + y + bias, h = s g / rms(s), s rounded to the stream's type before; grid [rows]."""
    rows: tl.constexpr = None if ROWS % BLOCK_R == 0 else ROWS
    cols: tl.constexpr = None if D == BLOCK_D else D
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    s = tile(x_ptr, row, d, D, rows, cols).to(tl.float32)
    s += tile(y_ptr, row, d, D, rows, cols).to(tl.float32)
    if BIAS:
        s += tile(bias_ptr, tl.arange(0, 1), d, D, None, cols)
    s = s.to(s_ptr.dtype.element_ty).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + EPSILON)
    put(s_ptr, s, row, d, D, rows, cols)
    put(h_ptr, s * (tl.load(g_ptr) * r)[:, None], row, d, D, rows, cols)


@triton.jit
def add_and_scale_norm_gradient_kernel(
    s_ptr,
    g_ptr,
    dstream_ptr,
    dh_ptr,
    ds_ptr,
    sums_ptr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ds = dstream + gradient of h = s g / rms(s), and a program's part of dbias [D] and dg; grid [programs].

    A program takes every tile of rows whose number is its own plus a multiple of the programs, and has its sums in
    registers, one for each place in a tile: only the last step sums over the rows of a tile, which takes shuffles.
    """
    rows: tl.constexpr = None if ROWS % BLOCK_R == 0 else ROWS
    cols: tl.constexpr = None if D == BLOCK_D else D
    d = tl.arange(0, BLOCK_D)
    g = tl.load(g_ptr)
    dg = tl.zeros((BLOCK_R,), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_R, ROWS, tl.num_programs(0) * BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        s = tile(s_ptr, row, d, D, rows, cols).to(tl.float32)
        dh = tile(dh_ptr, row, d, D, rows, cols).to(tl.float32)
        ds = tile(dstream_ptr, row, d, D, rows, cols).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(s * s, axis=1) / D + EPSILON)
        along = tl.sum(dh * s, axis=1)
        ds += (g * r)[:, None] * dh - (g * r * r * r * along / D)[:, None] * s
        dg += along * r
        if BIAS:
            dbias += ds
        put(ds_ptr, ds, row, d, D, rows, cols)
    WIDTH: tl.constexpr = D * BIAS + 1
    sums_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    if BIAS:
        put(sums_ptr, tl.sum(dbias, axis=0)[None, :], tl.arange(0, 1), d, D, None, cols)
    tl.store(sums_ptr + WIDTH - 1, tl.sum(dg, axis=0))
