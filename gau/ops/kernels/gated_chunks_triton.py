"""Triton kernels of the gated chunk product (`gau.ops.gated_chunks` says what it is, and has the same steps in JAX).

What they are for: U, V and what is made of them are [N, E], an order larger than anything else in the layer, and
reading and writing them is most of what a layer costs beside its matrix products. Kernels read the projections as the
matrix product left them and add bias and silu themselves. Of what that makes only v is written: it is a factor of three
products, whose loads and matrix units would else wait for it to be made again in every row of tiles.

Letters beside the house's: T = B G chunks of a batch; W columns of the projections p, those of U and V first; F = width
of the linear queries and keys (S for one direction of the states, 2 S for two), or of what is in their place (C, the
weights on another chunk, or 0); P parts of a sequence, each with a walk over its chunks that starts from nothing. Every
size is a compile-time constant; tiles that stick out of an array are masked.
"""

import triton
import triton.language as tl

from gau.ops.kernels.gates_triton import for_gate, silu, silu_gradient
from gau.ops.kernels.tiles import put, tile


@triton.jit
def _bias(ptr, col, cols: tl.constexpr):
    return tl.load(ptr + col, mask=col < cols, other=0.0).to(tl.float32)


@triton.jit
def states_kernel(
    p_ptr,
    bias_ptr,
    k_ptr,
    keep_ptr,
    share_ptr,
    v_ptr,
    m_ptr,
    totals_ptr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """m[g] = share * sum of k silu(v)^T over the chunks before g (after g, the second direction), grid [E, P, B D].

    One program walks over the chunks of its part with the state [S, BLOCK_E] in registers. Every part starts from zero;
    where there are several, the state at the end of each is a total, for the caller to carry on to the others.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    batch = tl.program_id(2) // (F // S)
    direction = tl.program_id(2) % (F // S)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    bias_v = _bias(bias_ptr + E, e, E)
    length: tl.constexpr = (G + P - 1) // P
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ends = ((batch * P + part).to(tl.int64) * F + direction * S) * E
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    first = part * length
    for i in range(0, (tl.minimum(first + length, G) - first) * blocks):
        step = first + i // blocks
        g = tl.where(direction == 0, step, G - 1 - step)
        chunk = (batch * G + g).to(tl.int64)
        row = (i % blocks) * BLOCK_C + c
        if i % blocks == 0:
            share = tl.load(share_ptr + chunk * (F // S) + direction)
            put(m_ptr + (chunk * F + direction * S) * E, state * share, s, e, E, S, E)
            state *= tl.load(keep_ptr + chunk * (F // S) + direction)
        k = tile(k_ptr + chunk * C * F + direction * S, row, s, F, C, S)
        v = silu(tile(p_ptr + chunk * C * W + E, row, e, W, C, E).to(tl.float32) + bias_v).to(k.dtype)
        if direction == 0:
            put(v_ptr + chunk * C * E, v, row, e, E, C, E)
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
    if P > 1:
        put(totals_ptr + ends, state, s, e, E, S, E)


@triton.jit
def _reading(chunk, F: tl.constexpr, READERS: tl.constexpr):
    """Returns where a chunk's q are, which chunk's m it reads, and how many columns of q there are.

    READERS is 0 where a chunk reads its own states, 1 where the second chunk reads the first, 2 where both read.
    """
    if READERS == 0:
        reader, read, width = chunk, chunk, F
    elif READERS == 1:
        reader, read, width = chunk // 2, chunk - 1, F * (chunk % 2).to(tl.int32)
    else:
        reader, read, width = chunk, chunk ^ 1, F
    return reader, read, width


@triton.jit
def output_kernel(
    p_ptr,
    bias_ptr,
    v_ptr,
    a_ptr,
    q_ptr,
    m_ptr,
    o_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    READERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """o = silu(u) (a silu(v) + q m), one tile a program, grid [C, E, T].

    In texts of two chunks of which READERS read the other one, its silu(v) is their m, and weights x on it their q.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    # Before the products, so that it is there when they are done.
    u = tile(p_ptr + chunk * C * W, m, e, W, C, E)
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    end = C
    if CAUSAL:
        end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, C)
    # One loop for both products, so that its pipeline fills once.
    reader, read, width = _reading(chunk, F, READERS)
    blocks = tl.cdiv(width, BLOCK_K)
    for i in range(0, blocks + tl.cdiv(end, BLOCK_K)):
        own = i >= blocks
        k = tl.where(own, i - blocks, i) * BLOCK_K + tl.arange(0, BLOCK_K)
        size = tl.where(own, C, F)
        weights_ptr = tl.where(own, a_ptr + chunk * C * C, q_ptr + reader * C * F)
        weights = tile(weights_ptr, m, k, size, C, size)
        x = tile(tl.where(own, v_ptr + chunk * C * E, m_ptr + read * F * E), k, e, E, size, E)
        mixed = tl.dot(weights, x, mixed, input_precision=PRECISION)
    gate = silu(for_gate(u.to(tl.float32) + _bias(bias_ptr, e, E)))
    put(o_ptr + chunk * C * E, mixed * gate, m, e, E, C, E)


@triton.jit
def states_gradient_kernel(
    q_ptr,
    dmixed_ptr,
    keep_ptr,
    share_ptr,
    dkv_ptr,
    totals_ptr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dkv[g] = sum of share q dmixed^T over the chunks that see g, the gradient of what g adds, grid [E, P, B D].

    The mirror of `states_kernel`: it walks against the states' direction. The share of the chunk that is being added
    stands apart from the state until the next one, so that sums in the matrix units need no factor.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    batch = tl.program_id(2) // (F // S)
    direction = tl.program_id(2) % (F // S)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    length: tl.constexpr = (G + P - 1) // P
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ends = ((batch * P + part).to(tl.int64) * F + direction * S) * E
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    first = part * length
    count = tl.minimum(first + length, G) - first
    share = 1.0
    for i in range(0, count * blocks):
        step = first + count - 1 - i // blocks
        g = tl.where(direction == 0, step, G - 1 - step)
        chunk = (batch * G + g).to(tl.int64)
        row = (i % blocks) * BLOCK_C + c
        if i % blocks == 0:
            state *= share
            put(dkv_ptr + (chunk * F + direction * S) * E, state, s, e, E, S, E)
            share = tl.load(share_ptr + chunk * (F // S) + direction)
            state *= tl.load(keep_ptr + chunk * (F // S) + direction) / share
        q = tile(q_ptr + chunk * C * F + direction * S, row, s, F, C, S)
        dmixed = tile(dmixed_ptr + chunk * C * E, row, e, E, C, E)
        state = tl.dot(tl.trans(q), dmixed, state, input_precision=PRECISION)
    if P > 1:
        put(totals_ptr + ends, state * share, s, e, E, S, E)


@triton.jit
def value_and_weight_gradient_kernel(
    p_ptr,
    bias_ptr,
    v_ptr,
    a_ptr,
    kt_ptr,
    m_ptr,
    dmixed_ptr,
    dkv_ptr,
    unused_ptr,
    dp_ptr,
    dbias_ptr,
    da_ptr,
    dq_ptr,
    dk_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    READERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SIDE: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradients of v, in the buffer that has du already, and of a, q and k; one tile of one of them a program.

        dv = (a^T dmixed + kt^T dkv) silu'      da = dmixed v^T      dq = dmixed m^T      dk = v dkv^T

    Grid [tiles of a chunk: C x C, C x F once or twice, and C x E; T]. All of a chunk's programs run at about the same
    time, so that what several of them read comes from memory once. With READERS (see `output_kernel`) m is v, kt is x
    of the chunk that reads, dkv its dmixed, dq is dx, and there is no dk.
    """
    across: tl.constexpr = (C + SIDE - 1) // SIDE
    across_f: tl.constexpr = (F + SIDE - 1) // SIDE
    squares: tl.constexpr = across * (across + across_f * (2 if READERS == 0 else 1))
    down: tl.constexpr = (C + BLOCK_M - 1) // BLOCK_M
    across_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    number = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    if number < across * across:
        row = number // across
        end = E
        if CAUSAL:
            # Above the diagonal are zeros.
            end = tl.where(number % across <= row, E, 0)
        col = number % across
        dmixed_ptr, v_ptr, da_ptr = dmixed_ptr + chunk * C * E, v_ptr + chunk * C * E, da_ptr + chunk * C * C
        _product(dmixed_ptr, v_ptr, da_ptr, row, col, end, C, C, E, PRECISION, SIDE, INNER)
    elif number < across * (across + across_f):
        number -= across * across
        row, col = number // across_f, number % across_f
        reader, read, width = _reading(chunk, F, READERS)
        # The first of two chunks may read nothing, and then has no place in dq.
        if width > 0:
            dmixed_ptr, m_ptr, dq_ptr = dmixed_ptr + chunk * C * E, m_ptr + read * F * E, dq_ptr + reader * C * F
            _product(dmixed_ptr, m_ptr, dq_ptr, row, col, E, C, F, E, PRECISION, SIDE, INNER)
    elif number < squares:
        number -= across * (across + across_f)
        row, col = number // across_f, number % across_f
        v_ptr, dkv_ptr, dk_ptr = v_ptr + chunk * C * E, dkv_ptr + chunk * F * E, dk_ptr + chunk * C * F
        _product(v_ptr, dkv_ptr, dk_ptr, row, col, E, C, F, E, PRECISION, SIDE, INNER)
    else:
        number -= squares
        m = (number % down) * BLOCK_M + tl.arange(0, BLOCK_M)
        e = (number // down) * BLOCK_E + tl.arange(0, BLOCK_E)
        x = tile(p_ptr + chunk * C * W + E, m, e, W, C, E)
        dv = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        begin = 0
        if CAUSAL:
            begin = (number % down) * BLOCK_M
        # What was made of these values outside this chunk, and within it, in one loop.
        reader, source, width = chunk, chunk, F
        if READERS > 0:
            source = chunk ^ 1
            reader, _, width = _reading(source, F, READERS)
        blocks = tl.cdiv(width, BLOCK_K)
        for i in range(0, blocks + tl.cdiv(C - begin, BLOCK_K)):
            own = i >= blocks
            c = tl.where(own, begin + (i - blocks) * BLOCK_K, i * BLOCK_K) + tl.arange(0, BLOCK_K)
            rows = tl.where(own, C, F)
            weights = tile(tl.where(own, a_ptr + chunk * C * C, kt_ptr + reader * F * C), c, m, C, rows, C)
            made = tile(tl.where(own, dmixed_ptr + chunk * C * E, dkv_ptr + source * F * E), c, e, E, rows, E)
            dv = tl.dot(tl.trans(weights), made, dv, input_precision=PRECISION)
        dv *= silu_gradient(x.to(tl.float32) + _bias(bias_ptr + E, e, E))
        put(dp_ptr + chunk * C * W + E, dv, m, e, W, C, E)
        tl.store(dbias_ptr + (chunk * down + number % down) * E + e, tl.sum(dv, axis=0), mask=e < E)
        # The columns of another reader.
        for start in range((number // down) * BLOCK_E, W - 2 * E, across_e * BLOCK_E):
            w = 2 * E + start + tl.arange(0, BLOCK_E)
            put(dp_ptr + chunk * C * W, tl.zeros((BLOCK_M, BLOCK_E), tl.float32), m, w, W, C, W)


@triton.jit
def _product(
    x_ptr, y_ptr, z_ptr, row, col, end,
    ROWS: tl.constexpr, COLS: tl.constexpr, E: tl.constexpr,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Stores a tile of z = x y^T, [ROWS, COLS], of rows x [ROWS, E] and y [COLS, E] up to column `end`."""
    i = row * SIDE + tl.arange(0, SIDE)
    j = col * SIDE + tl.arange(0, SIDE)
    z = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, end, INNER):
        e = start + tl.arange(0, INNER)
        x = tile(x_ptr, i, e, E, ROWS, E)
        y = tile(y_ptr, j, e, E, COLS, E)
        z = tl.dot(x, tl.trans(y), z, input_precision=PRECISION)
    put(z_ptr, z, i, j, COLS, ROWS, COLS)
