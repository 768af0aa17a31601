"""What the Triton kernels of gated attention share: silu, and the gradient of a gate from what it let through.

Of o = silu(u) x the backward pass needs x for the gradient of u. It is o / silu(u), so that o alone is saved, which the
matmul after the gate saves anyway.

Arrays of [N, E] are read and written once by each kernel here; at size base, 65,536 tokens in bfloat16, one has 201 MB.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile, store_tile

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
def nonzero_gate(u):
    """u, but so that silu(u) is no less than 1e-25: o / silu(u) must exist. It changes o by less than 1e-20 x."""
    u = tl.where(tl.abs(u) < SMALLEST_GATE, SMALLEST_GATE, u)
    return tl.where(u < LOWEST_GATE, LOWEST_GATE, u)


@triton.jit
def gate_gradient(u, o, do):
    """The gradient of u for o = silu(u) x, where u is from `nonzero_gate`: do o silu'(u) / silu(u)."""
    return do * (o / u) * (1 + u * (1 - sigmoid(u)))


@triton.jit
def silu_gradient(x):
    """The derivative of silu at x."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def load_biased(p_ptr, bias_ptr, which: tl.constexpr, row, col, b, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr):
    """Returns p + bias of the gate (which = 0) or of the values (1), a float32 tile of [N, E] of sequence b."""
    x = load_tile(p_ptr + b * N * W + which * E, row, col, W, N, E).to(tl.float32)
    return x + tl.load(bias_ptr + which * E + col, mask=col < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def tile_of_program(BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Returns the tokens, the columns and the sequence of a program's tile, grid [E, N, B]."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    return row, col, tl.program_id(2).to(tl.int64)


@triton.jit
def _store_of_sequence(
    ptr, x, row, col, b,
    B: tl.constexpr, N: tl.constexpr, E: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """Stores a tile of sequence b in an array [B, N, E], or [N, B, E] if TOKENS_FIRST."""
    if TOKENS_FIRST:
        store_tile(ptr + b * E, x, row, col, B * E, N, E)
    else:
        store_tile(ptr + b * N * E, x, row, col, E, N, E)


@triton.jit
def values_kernel(
    p_ptr, bias_ptr, v_ptr,
    B: tl.constexpr, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """v = silu(V + bias) for the projections [U, V, ...] = p.

    Grid    [E / BLOCK_E, N / BLOCK_N, B]
    Tile    v [BLOCK_N, BLOCK_E]
    Reads   V, the columns from E to 2 E of p [B, N, W]
    Writes  v [B, N, E], or [N, B, E] if TOKENS_FIRST
    Bytes   2 arrays of [N, E] a layer
    """
    row, col, b = tile_of_program(BLOCK_N, BLOCK_E)
    v = silu(load_biased(p_ptr, bias_ptr, 1, row, col, b, N, E, W))  # [BN, BE]
    _store_of_sequence(v_ptr, v, row, col, b, B, N, E, TOKENS_FIRST)


@triton.jit
def gate_gradient_kernel(
    p_ptr, bias_ptr, do_ptr, o_ptr, dp_ptr, dx_ptr, dbias_ptr, sums_ptr,
    B: tl.constexpr, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    ROW_SUMS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx = do silu(u), du = do x silu'(u) and its sum over tokens, for o = silu(u) x with u = U + bias.

    Grid    [E / BLOCK_E times N / SPAN, columns first; B]
    Tile    SPAN tokens, BLOCK_N at a time, of BLOCK_E columns
    Reads   U, the first E columns of p [B, N, W]; do and o [B, N, E]
    Writes  du, the first E columns of dp [B, N, W]; dx [B, N, E], or [N, B, E] if TOKENS_FIRST; the sums over the
            tokens of a program, dbias [B N / SPAN, E]; if ROW_SUMS, the sums of dx x = do o over the columns of a
            program, sums [E / BLOCK_E, B, N]
    Bytes   5 arrays of [N, E] a layer
    """
    across: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    spans = tl.num_programs(0) // across
    number, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = (number % across) * BLOCK_E + tl.arange(0, BLOCK_E)
    dbias = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    # With a number of stages of its own a loop loads ahead.
    for start in tl.range(0, SPAN, BLOCK_N, num_stages=STAGES):
        row = (number // across).to(tl.int64) * SPAN + start + tl.arange(0, BLOCK_N)
        do = load_tile(do_ptr + b * N * E, row, col, E, N, E).to(tl.float32)  # [BN, BE]
        o = load_tile(o_ptr + b * N * E, row, col, E, N, E).to(tl.float32)  # [BN, BE]
        u = nonzero_gate(load_biased(p_ptr, bias_ptr, 0, row, col, b, N, E, W))  # [BN, BE]
        _store_of_sequence(dx_ptr, do * silu(u), row, col, b, B, N, E, TOKENS_FIRST)
        du = gate_gradient(u, o, do)
        store_tile(dp_ptr + b * N * W, du, row, col, W, N, E)
        dbias += du
        if ROW_SUMS:
            sums = (number % across) * tl.num_programs(1) * N + b * N + row
            tl.store(sums_ptr + sums, tl.sum(do * o, 1), mask=row < N)
    tl.store(dbias_ptr + (b * spans + number // across) * E + col, tl.sum(dbias, 0), mask=col < E)
