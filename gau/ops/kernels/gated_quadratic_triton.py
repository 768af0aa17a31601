"""Triton kernels of what is [N, E] around the products of gated quadratic attention. Grids are [E, N, B].

What the products make, a v and the gradient of v, comes in pieces, one for each group of blocks
(`gau.ops.kernels.quadratic`): [B, rows, E], up to eight of them. A kernel that reads them reads all at once.
"""

import triton
import triton.language as tl

from gau.ops.kernels.gates_triton import for_gate, place, projection, silu, silu_gradient
from gau.ops.kernels.tiles import put


@triton.jit
def _join(
    pieces, row, col, b,
    n: tl.constexpr, E: tl.constexpr, LENGTH: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Loads a tile from the piece of its group; no piece has the tokens of others, no tile those of two groups."""
    tl.static_assert(LENGTH % BLOCK_N == 0)
    g = tl.program_id(1) * BLOCK_N // LENGTH
    piece = pieces[0]
    for other in tl.static_range(1, COUNT):
        piece = tl.where(g == other, pieces[other], piece)
    offsets = (b * tl.minimum(LENGTH, n - g * LENGTH) - g * LENGTH + row)[:, None] * E + col[None, :]
    return tl.load(piece + offsets, mask=(row < n)[:, None] & (col < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def output_kernel(
    p_ptr, bias_ptr, av0, av1, av2, av3, av4, av5, av6, av7, o_ptr,
    n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = silu(u) (a v)."""
    row, col, b = place(BLOCK_N, BLOCK_E)
    av = _join((av0, av1, av2, av3, av4, av5, av6, av7), row, col, b, n, E, LENGTH, GROUPS, BLOCK_N)
    gate = silu(for_gate(projection(p_ptr, bias_ptr, 0, row, col, b, n, E, W)))
    put(o_ptr + b * n * E, gate * av, row, col, E, n, E)


@triton.jit
def value_gradient_kernel(
    p_ptr, bias_ptr, unused_ptr, dv0, dv1, dv2, dv3, dv4, dv5, dv6, dv7, dp_ptr, dbias_ptr,
    n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of what v is made of, in its columns of dp, which has that of u; and zeros for another reader's."""
    row, col, b = place(BLOCK_N, BLOCK_E)
    dv = _join((dv0, dv1, dv2, dv3, dv4, dv5, dv6, dv7), row, col, b, n, E, LENGTH, GROUPS, BLOCK_N)
    dv *= silu_gradient(projection(p_ptr, bias_ptr, 1, row, col, b, n, E, W))
    put(dp_ptr + b * n * W + E, dv, row, col, W, n, E)
    tiles = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias_ptr + tiles * E + col, tl.sum(dv, 0), mask=col < E)
    for start in range(tl.program_id(0) * BLOCK_E, W - 2 * E, tl.num_programs(0) * BLOCK_E):
        rest = 2 * E + start + tl.arange(0, BLOCK_E)
        put(dp_ptr + b * n * W, tl.zeros((BLOCK_N, BLOCK_E), tl.float32), row, rest, W, n, W)
