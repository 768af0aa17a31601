"""Triton kernels of what is [N, E] around the products of gated quadratic attention: activations and their gradients.

The products want values and gradients in pieces, a piece for each group of blocks (`gau.ops.kernels.quadratic`) and
some with the groups before or after it: [B, rows, E], up to eight of them. A kernel reads and writes all pieces at
once, and no piece is a copy of another. Grids are [E, N, B].
"""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def _piece(row, col, b, E: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr):
    """Returns where tokens and columns of text b stand in a piece of the tokens [FIRST, STOP), and which do."""
    place = (b * (STOP - FIRST) + row - FIRST)[:, None] * E + col[None, :]
    return place, ((row >= FIRST) & (row < STOP))[:, None] & (col < E)[None, :]


@triton.jit
def _end(g: tl.constexpr, n: tl.constexpr, LENGTH: tl.constexpr):
    return n if (g + 1) * LENGTH > n else (g + 1) * LENGTH


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
    place = (b * tl.minimum(LENGTH, n - g * LENGTH) - g * LENGTH + row)[:, None] * E + col[None, :]
    return tl.load(piece + place, mask=(row < n)[:, None] & (col < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _spread(
    pieces, value, row, col, b,
    n: tl.constexpr, E: tl.constexpr, LENGTH: tl.constexpr, COUNT: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Stores a tile into every piece that has its tokens: those of a group and, if asked, before or after it."""
    for g in tl.static_range(COUNT):
        place, inside = _piece(row, col, b, E, 0 if BEFORE else g * LENGTH, n if AFTER else _end(g, n, LENGTH))
        tl.store(pieces[g] + place, value.to(pieces[g].dtype.element_ty), mask=inside)


@triton.jit
def _projection(p_ptr, bias_ptr, which: tl.constexpr, row, col, b, n: tl.constexpr, E: tl.constexpr, W: tl.constexpr):
    """Returns what silu is applied to, of the gate (0) or of the values (1), and its sigmoid."""
    x = tile(p_ptr + b * n * W + which * E, row, col, W, n, E).to(tl.float32)
    x += tl.load(bias_ptr + which * E + col, mask=col < E, other=0.0).to(tl.float32)[None, :]
    return x, tl.sigmoid(x)


@triton.jit
def _put_gradient(
    dp_ptr, dbias_ptr, dx, which: tl.constexpr, row, col, b, n: tl.constexpr, E: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Stores a tile of the gradient of a projection, and its sum over the tile's tokens."""
    put(dp_ptr + b * n * W + which * E, dx, row, col, W, n, E)
    tiles = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias_ptr + tiles * E + col, tl.sum(dx, 0), mask=col < E)


@triton.jit
def values_kernel(
    p_ptr, bias_ptr, v0, v1, v2, v3, v4, v5, v6, v7,
    n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, COUNT: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """v = silu(p + bias) of the second E columns, in pieces."""
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(2).to(tl.int64)
    x, sigmoid = _projection(p_ptr, bias_ptr, 1, row, col, b, n, E, W)
    _spread((v0, v1, v2, v3, v4, v5, v6, v7), x * sigmoid, row, col, b, n, E, LENGTH, COUNT, BEFORE, AFTER)


@triton.jit
def gate_gradient_kernel(
    p_ptr, bias_ptr, do_ptr, av0, av1, av2, av3, av4, av5, av6, av7,
    dp_ptr, dbias_ptr, d0, d1, d2, d3, d4, d5, d6, d7,
    n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of o = silu(u) av: the gradient of av in pieces, and that of u in its columns of dp."""
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(2).to(tl.int64)
    do = tile(do_ptr + b * n * E, row, col, E, n, E).to(tl.float32)
    u, sigmoid = _projection(p_ptr, bias_ptr, 0, row, col, b, n, E, W)
    _spread((d0, d1, d2, d3, d4, d5, d6, d7), do * u * sigmoid, row, col, b, n, E, LENGTH, COUNT, BEFORE, AFTER)
    av = _join((av0, av1, av2, av3, av4, av5, av6, av7), row, col, b, n, E, LENGTH, GROUPS, BLOCK_N)
    _put_gradient(dp_ptr, dbias_ptr, do * av * sigmoid * (1 + u * (1 - sigmoid)), 0, row, col, b, n, E, W)


@triton.jit
def value_gradient_kernel(
    p_ptr, bias_ptr, unused_ptr, dv0, dv1, dv2, dv3, dv4, dv5, dv6, dv7, dp_ptr, dbias_ptr,
    n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, LENGTH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of what v is made of, in its columns of dp, which has that of u; and zeros for another reader's."""
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(2).to(tl.int64)
    x, sigmoid = _projection(p_ptr, bias_ptr, 1, row, col, b, n, E, W)
    dv = _join((dv0, dv1, dv2, dv3, dv4, dv5, dv6, dv7), row, col, b, n, E, LENGTH, GROUPS, BLOCK_N)
    _put_gradient(dp_ptr, dbias_ptr, dv * sigmoid * (1 + x * (1 - sigmoid)), 1, row, col, b, n, E, W)
    for start in range(tl.program_id(0) * BLOCK_E, W - 2 * E, tl.num_programs(0) * BLOCK_E):
        rest = 2 * E + start + tl.arange(0, BLOCK_E)
        put(dp_ptr + b * n * W, tl.zeros((BLOCK_N, BLOCK_E), tl.float32), row, rest, W, n, W)
