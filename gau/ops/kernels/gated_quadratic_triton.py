"""Triton kernels of what is [N, E] around the matmuls of gated quadratic attention.

What the matmuls make, a v and the gradient of v, comes in pieces, one for each group of blocks
(`gau.ops.kernels.quadratic`): [B, rows, E], up to eight of them. A kernel that reads them gets all eight pointers.
"""

import triton
import triton.language as tl

from gau.ops.kernels.gates_triton import load_biased, nonzero_gate, silu, silu_gradient, tile_of_program
from gau.ops.kernels.load_store import store_tile


@triton.jit
def _load_from_pieces(
    pieces, first, row, col, b,
    N: tl.constexpr, E: tl.constexpr, LENGTH: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Loads a tile, whose rows begin with `first`, from the piece of its group; LENGTH tokens are a group, so that no
    tile lies in two of them."""
    tl.static_assert(LENGTH % BLOCK_N == 0)
    g = first // LENGTH
    piece = pieces[0]
    for other in tl.static_range(1, COUNT):
        piece = tl.where(g == other, pieces[other], piece)
    offsets = (b * tl.minimum(LENGTH, N - g * LENGTH) - g * LENGTH + row)[:, None] * E + col[None, :]
    return tl.load(piece + offsets, mask=(row < N)[:, None] & (col < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def output_kernel(
    p_ptr, bias_ptr, av0, av1, av2, av3, av4, av5, av6, av7, o_ptr,
    N: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = silu(U + bias) (a v).

    Grid    [E / BLOCK_E, N / BLOCK_N, B]
    Tile    o [BLOCK_N, BLOCK_E]
    Reads   U, the first E columns of p [B, N, W]; the pieces of a v
    Writes  o [B, N, E]
    Bytes   3 arrays of [N, E] a layer
    """
    row, col, b = tile_of_program(BLOCK_N, BLOCK_E)
    pieces = (av0, av1, av2, av3, av4, av5, av6, av7)
    av = _load_from_pieces(pieces, tl.program_id(1) * BLOCK_N, row, col, b, N, E, LENGTH, GROUPS, BLOCK_N)  # [BN, BE]
    gate = silu(nonzero_gate(load_biased(p_ptr, bias_ptr, 0, row, col, b, N, E, W)))  # [BN, BE]
    store_tile(o_ptr + b * N * E, gate * av, row, col, E, N, E)


@triton.jit
def value_gradient_kernel(
    p_ptr, bias_ptr, unused_ptr, dv0, dv1, dv2, dv3, dv4, dv5, dv6, dv7, dp_ptr, dbias_ptr,
    N: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dV = dv silu'(V + bias) and its sum over tokens; zeros for the columns of p that others read.

    Grid    [E / BLOCK_E times N / SPAN, columns first; B]
    Tile    SPAN tokens, BLOCK_N at a time, of BLOCK_E columns
    Reads   V, the columns from E to 2 E of p [B, N, W]; the pieces of dv
    Writes  the columns from E on of dp [B, N, W], which holds dU already (dp takes over the buffer of `unused_ptr`);
            the sums over the tokens of a program, dbias [B N / SPAN, E]
    Bytes   3 arrays of [N, E] a layer
    """
    across: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    spans = tl.num_programs(0) // across
    number, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, span = number % across, number // across
    col = column * BLOCK_E + tl.arange(0, BLOCK_E)
    pieces = (dv0, dv1, dv2, dv3, dv4, dv5, dv6, dv7)
    dbias = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    # With a number of stages of its own a loop loads ahead.
    for start in tl.range(0, SPAN, BLOCK_N, num_stages=STAGES):
        first = span * SPAN + start
        row = first.to(tl.int64) + tl.arange(0, BLOCK_N)
        dv = _load_from_pieces(pieces, first, row, col, b, N, E, LENGTH, GROUPS, BLOCK_N)  # [BN, BE]
        dv *= silu_gradient(load_biased(p_ptr, bias_ptr, 1, row, col, b, N, E, W))
        store_tile(dp_ptr + b * N * W + E, dv, row, col, W, N, E)
        dbias += dv
    tl.store(dbias_ptr + (b * spans + span) * E + col, tl.sum(dbias, 0), mask=col < E)
    for start in range(column * BLOCK_E, W - 2 * E, across * BLOCK_E):
        rest = 2 * E + start + tl.arange(0, BLOCK_E)
        for first in range(0, SPAN, BLOCK_N):
            row = span.to(tl.int64) * SPAN + first + tl.arange(0, BLOCK_N)
            store_tile(dp_ptr + b * N * W, tl.zeros((BLOCK_N, BLOCK_E), tl.float32), row, rest, W, N, W)
