"""Triton kernel of ScaleNorm's gradient, together with that of the residual stream around it."""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def scale_norm_gradient_kernel(
    x_ptr,
    g_ptr,
    dstream_ptr,
    dy_ptr,
    dy_again_ptr,
    dx_ptr,
    dg_ptr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = dstream + gradient of y = x g / rms(x), which is dy + dy_again, and each's part of dg; grid [rows]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    x = tile(x_ptr, row, d, D, ROWS, D).to(tl.float32)
    dy = tile(dy_ptr, row, d, D, ROWS, D).to(tl.float32)
    dy += tile(dy_again_ptr, row, d, D, ROWS, D).to(tl.float32)
    g = tl.load(g_ptr)
    r = 1 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPSILON)
    along = tl.sum(dy * x, axis=1)
    dx = g * (r[:, None] * dy - (r * r * r * along / D)[:, None] * x)
    dx += tile(dstream_ptr, row, d, D, ROWS, D).to(tl.float32)
    put(dx_ptr, dx, row, d, D, ROWS, D)
    tl.store(dg_ptr + tl.program_id(0), tl.sum(along * r, axis=0))
