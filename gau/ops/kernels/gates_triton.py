"""What the Triton kernels of gated attention share: silu, and the gradient of a gate from what it let through.

Of o = silu(u) x the backward pass needs x for the gradient of u. It is o / silu(u), so o alone is kept, which the
product after the gate keeps anyway.
"""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile

# How near to 0 a gate before silu may come, and how far below: silu of it divides what it let through.
SMALLEST_GATE, LOWEST_GATE = tl.constexpr(1e-20), tl.constexpr(-60.0)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): a reciprocal root, squared, is three instructions; a division takes six."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def for_gate(u):
    """u, where silu(u) is no less than 1e-25: o / silu(u) must exist. It changes o by less than 1e-20 x."""
    u = tl.where(tl.abs(u) < SMALLEST_GATE, SMALLEST_GATE, u)
    return tl.where(u < LOWEST_GATE, LOWEST_GATE, u)


@triton.jit
def gate_gradient(u, o, do):
    """The gradient of u for o = silu(u) x, where u is from `for_gate`: do o silu'(u) / silu(u)."""
    return do * (o / u) * (1 + u * (1 - sigmoid(u)))


@triton.jit
def silu_gradient(x):
    """The derivative of silu at x."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def projection(p_ptr, bias_ptr, which: tl.constexpr, row, col, b, n: tl.constexpr, E: tl.constexpr, W: tl.constexpr):
    """Returns what silu is applied to, of the gate (0) or of the values (1), for a tile of [n, E] of text b."""
    x = tile(p_ptr + b * n * W + which * E, row, col, W, n, E).to(tl.float32)
    return x + tl.load(bias_ptr + which * E + col, mask=col < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def place(BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns the tokens, the columns and the text of a program's tile, grid [E, N, B]."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    return row, col, tl.program_id(2).to(tl.int64)


@triton.jit
def _put_text(
    ptr, x, row, col, b,
    B: tl.constexpr, n: tl.constexpr, E: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """Stores a tile of text b in an array [B, n, E], or [n, B, E] if TOKENS_FIRST."""
    if TOKENS_FIRST:
        put(ptr + b * E, x, row, col, B * E, n, E)
    else:
        put(ptr + b * n * E, x, row, col, E, n, E)


@triton.jit
def values_kernel(
    p_ptr, bias_ptr, v_ptr,
    B: tl.constexpr, n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """v = silu(p + bias) of the values, grid [E, n, B]."""
    row, col, b = place(BLOCK_N, BLOCK_E)
    _put_text(v_ptr, silu(projection(p_ptr, bias_ptr, 1, row, col, b, n, E, W)), row, col, b, B, n, E, TOKENS_FIRST)


@triton.jit
def gate_gradient_kernel(
    p_ptr, bias_ptr, do_ptr, o_ptr, dp_ptr, dx_ptr, dbias_ptr,
    B: tl.constexpr, n: tl.constexpr, E: tl.constexpr, W: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of o = silu(u) x: the gradient of x, [n, B, E] if TOKENS_FIRST or else [B, n, E], and that of u in dp's columns.

    Grid [tiles of E, then of n; B]. A program has SPAN tokens; the sum over them of u's gradient is a row of dbias.
    """
    across: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    down = tl.num_programs(0) // across
    number, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = (number % across) * BLOCK_E + tl.arange(0, BLOCK_E)
    dbias = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, SPAN, BLOCK_N):
        row = (number // across).to(tl.int64) * SPAN + start + tl.arange(0, BLOCK_N)
        do = tile(do_ptr + b * n * E, row, col, E, n, E).to(tl.float32)
        o = tile(o_ptr + b * n * E, row, col, E, n, E).to(tl.float32)
        u = for_gate(projection(p_ptr, bias_ptr, 0, row, col, b, n, E, W))
        _put_text(dx_ptr, do * silu(u), row, col, b, B, n, E, TOKENS_FIRST)
        du = gate_gradient(u, o, do)
        put(dp_ptr + b * n * W, du, row, col, W, n, E)
        dbias += tl.sum(du, 0)
    tl.store(dbias_ptr + (b * down + number // across) * E + col, dbias, mask=col < E)
