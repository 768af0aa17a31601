"""Triton kernels of the gated chunk matmul (`gau.ops.kernels.gated_chunks` says what it is).

What they are for: U, V and what is made of them are [N, E], an order larger than anything else in the layer, and
reading and writing them is most of what a layer costs beside its library matmuls. Kernels read the projections as the
library left them and add bias and silu themselves. Of what that makes only v is written: it is a factor of three
matmuls, whose loads and matrix units would else wait for it to be made again in every row of tiles.

Letters are those of `gau.ops`: W columns of the projections p = [U, V, ...]; J directions of the scans over the chunks,
1 if causal, else 2; F = J S columns of the linear queries and keys, or columns of what stands in their place (C for the
weights on the other chunk, 0 for nothing). Each of the PARTS of a sequence has a scan of its own that starts from zero.
B G is the number of chunks in a batch. Every size is a compile-time constant; what sticks out of an array is masked.

A sequence of two chunks may do without states (`gau.ops.kernels.chunk_pairs`). CROSS_CHUNK says what chunks read:

    0   their states m, with their queries q
    1   the second chunk reads the first: v of the first stands for m, weights x on it for q
    2   both chunks read the other one, likewise

With WINDOW 2 weights a [C, 2 C] are on the chunk before and on the own one, and a chunk reads the state that the chunk
before would read with WINDOW 1; those of the first chunk of a sequence on the chunk before are not read. Causal, and
with CROSS_CHUNK 0: in the place of the state a sequence of two chunks then has nothing. What chunks add that nobody
reads, the last two, has no gradient, and dkv is not written there: of the four chunks of 512 tokens that is half of it.

With FAR the sums of o and dV begin with what far chunks gave (`gau.ops.kernels.far_chunks`).

Bytes are of size base (E = 1,536, S = 128, C = 256), causal, with 65,536 tokens in bfloat16, every array counted once:
one of [N, E] has 201 MB, the states m 101 MB, the weights a 34 MB, q, k and the other columns of p 17 MB each. A layer
moves 3.7 GB, of them 1.0 GB in `gates_triton.gate_gradient_kernel`.
"""

import triton
import triton.language as tl

from gau.ops.kernels.gates_triton import nonzero_gate, silu, silu_gradient
from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def _load_bias(ptr, col, cols: tl.constexpr):
    return tl.load(ptr + col, mask=col < cols, other=0.0).to(tl.float32)


@triton.jit
def states_kernel(
    p_ptr, bias_ptr, k_ptr, carry_mask_ptr, state_scale_ptr, v_ptr, m_ptr, totals_ptr,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, F: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """m[g] = state_scale * sum of k silu(v)^T over the chunks before g; in the second direction over those after g.

    Grid    [E / BLOCK_E, PARTS, B J]
    Tile    the state [S, BLOCK_E] in registers, through the chunks of a part, BLOCK_C tokens at a time
    Reads   V, the columns from E to 2 E of p [B, G, C, W]; k [B, G, C, F]; carry_mask and state_scale [B, G, J]
    Writes  v [B, G, C, E] (the first direction); m [B, G, F, E]; where there are several parts, the state at the end
            of each, totals [B, PARTS, F, E], for the caller to carry on to the others
    Bytes   520 MB a layer: V, k, v, m
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    batch = tl.program_id(2) // (F // S)
    direction = tl.program_id(2) % (F // S)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    bias_v = _load_bias(bias_ptr + E, e, E)
    length: tl.constexpr = (G + PARTS - 1) // PARTS
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ends = ((batch * PARTS + part).to(tl.int64) * F + direction * S) * E
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    first = part * length
    for i in range(0, (tl.minimum(first + length, G) - first) * blocks):
        step = first + i // blocks
        g = tl.where(direction == 0, step, G - 1 - step)
        chunk = (batch * G + g).to(tl.int64)
        row = (i % blocks) * BLOCK_C + c
        if i % blocks == 0:
            state_scale = tl.load(state_scale_ptr + chunk * (F // S) + direction)
            store_tile(m_ptr + (chunk * F + direction * S) * E, state * state_scale, s, e, E, S, E)
            state *= tl.load(carry_mask_ptr + chunk * (F // S) + direction)
        k = load_tile(k_ptr + chunk * C * F + direction * S, row, s, F, C, S)  # [BC, BS]
        v = load_tile(p_ptr + chunk * C * W + E, row, e, W, C, E)  # [BC, BE]
        v = silu(v.to(tl.float32) + bias_v).to(k.dtype)
        if direction == 0:
            store_tile(v_ptr + chunk * C * E, v, row, e, E, C, E)
        # [BS, BC] @ [BC, BE]
        state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
    if PARTS > 1:
        store_tile(totals_ptr + ends, state, s, e, E, S, E)


@triton.jit
def _what_is_read(chunk, G: tl.constexpr, F: tl.constexpr, WINDOW: tl.constexpr, CROSS_CHUNK: tl.constexpr):
    """Returns where the chunk's queries q are, which chunk's m it reads, and how many columns of q there are."""
    if WINDOW == 2:
        # The states of the first two chunks would be zeros.
        reader, source, width = chunk, chunk - 1, F * (chunk % G > 1).to(tl.int32)
    elif CROSS_CHUNK == 0:
        reader, source, width = chunk, chunk, F
    elif CROSS_CHUNK == 1:
        reader, source, width = chunk // 2, chunk - 1, F * (chunk % 2).to(tl.int32)
    else:
        reader, source, width = chunk, chunk ^ 1, F
    return reader, source, width


@triton.jit
def output_kernel(
    p_ptr, bias_ptr, v_ptr, a_ptr, q_ptr, m_ptr, far_ptr, o_ptr,
    G: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CROSS_CHUNK: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = silu(U + bias) (a v + q m + far).

    Grid    [C / BLOCK_M, E / BLOCK_E, B G]
    Tile    o [BLOCK_M, BLOCK_E], sums in steps of BLOCK_K
    Reads   U, the first E columns of p [B, G, C, W]; v [B, G, C, E]; a [B, G, C, WINDOW C]; q [B, G, C, F];
            m [B, G, F, E] (with CROSS_CHUNK 1 q is x [B, C, C], with 2 [B, 2, C, C]; both have v for m);
            far [B, G, C, E] if FAR
    Writes  o [B, G, C, E]
    Bytes   755 MB a layer: U, v, a, q, m, o; 956 MB with far
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    # Before the matmuls, so that it has arrived when they are done.
    u = load_tile(p_ptr + chunk * C * W, m, e, W, C, E)  # [BM, BE]
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if FAR:
        mixed = load_tile(far_ptr + chunk * C * E, m, e, E, C, E).to(tl.float32)  # [BM, BE]
    begin, end = 0, C
    if CAUSAL:
        end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, C)
    if WINDOW == 2:
        # Before the rows of v lie those of the chunk before, to which the first columns of a belong.
        begin, end = tl.where(chunk % G > 0, 0, C), C + end
    # q m and a v in one loop, so that its pipeline fills once.
    reader, source, width = _what_is_read(chunk, G, F, WINDOW, CROSS_CHUNK)
    blocks = tl.cdiv(width, BLOCK_K)
    for i in range(0, blocks + tl.cdiv(end - begin, BLOCK_K)):
        own = i >= blocks
        k = tl.where(own, begin + (i - blocks) * BLOCK_K, i * BLOCK_K) + tl.arange(0, BLOCK_K)
        size = tl.where(own, WINDOW * C, F)
        weights_ptr = tl.where(own, a_ptr + chunk * C * WINDOW * C, q_ptr + reader * C * F)
        weights = load_tile(weights_ptr, m, k, size, C, size)  # [BM, BK]
        value_ptr = tl.where(own, v_ptr + (chunk + 1 - WINDOW) * C * E, m_ptr + source * F * E)
        x = load_tile(value_ptr, k, e, E, size, E)  # [BK, BE]
        # [BM, BK] @ [BK, BE]
        mixed = tl.dot(weights, x, mixed, input_precision=PRECISION)
    gate = silu(nonzero_gate(u.to(tl.float32) + _load_bias(bias_ptr, e, E)))
    store_tile(o_ptr + chunk * C * E, mixed * gate, m, e, E, C, E)


@triton.jit
def states_gradient_kernel(
    q_ptr, dmixed_ptr, carry_mask_ptr, state_scale_ptr, dkv_ptr, totals_ptr,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    PARTS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dkv[g] = sum of state_scale q dmixed^T over the chunks that see g: the gradient of k silu(v)^T of chunk g.

    The mirror of `states_kernel`: each scan goes against the direction of the states. The scale of the chunk that is
    being added is kept apart from the state until the next chunk, so that sums in the matrix units need no factor.

    Grid    [E / BLOCK_E, PARTS, B J]
    Tile    the state [S, BLOCK_E] in registers, through the chunks of a part, BLOCK_C tokens at a time
    Reads   q [B, G, C, F]; dmixed [B, G, C, E], the gradient of a v + q m; carry_mask and state_scale [B, G, J]
    Writes  dkv [B, G, F, E]; where there are several parts, the state at the end of each, totals [B, PARTS, F, E]
    Bytes   319 MB a layer: q, dmixed, dkv
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    batch = tl.program_id(2) // (F // S)
    direction = tl.program_id(2) % (F // S)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    length: tl.constexpr = (G + PARTS - 1) // PARTS
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ends = ((batch * PARTS + part).to(tl.int64) * F + direction * S) * E
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    first = part * length
    count = tl.minimum(first + length, G) - first
    state_scale = 1.0
    # In a window of two nobody reads the last state. What reads the first one, which is zeros, adds to no other.
    begin = tl.where(part == PARTS - 1, (WINDOW - 1) * blocks, 0)
    end = (count - 1) * blocks + tl.where(part == 0, 1, blocks)
    for i in range(begin, end):
        step = first + count - 1 - i // blocks
        g = tl.where(direction == 0, step, G - 1 - step)
        chunk = (batch * G + g).to(tl.int64)
        row = (i % blocks) * BLOCK_C + c
        is_read = True
        if WINDOW == 2:
            # The state that this chunk would read alone is read by the next one.
            row += C
            is_read = g < G - 2
        if i % blocks == 0:
            state *= state_scale
            if is_read:
                store_tile(dkv_ptr + (chunk * F + direction * S) * E, state, s, e, E, S, E)
            state_scale = tl.load(state_scale_ptr + chunk * (F // S) + direction)
            state *= tl.load(carry_mask_ptr + chunk * (F // S) + direction) / state_scale
        q = load_tile(q_ptr + chunk * C * F + direction * S, row, s, F, WINDOW * C, S)  # [BC, BS]
        dmixed = load_tile(dmixed_ptr + chunk * C * E, row, e, E, WINDOW * C, E)  # [BC, BE]
        # [BS, BC] @ [BC, BE]
        state = tl.dot(tl.trans(q), dmixed, state, input_precision=PRECISION)
    if PARTS > 1:
        store_tile(totals_ptr + ends, state * state_scale, s, e, E, S, E)


@triton.jit
def value_and_weight_gradient_kernel(
    p_ptr, bias_ptr, v_ptr, a_ptr, kt_ptr, m_ptr, dmixed_ptr, dkv_ptr, far_ptr, unused_ptr,
    dp_ptr, dbias_ptr, da_ptr, dq_ptr, dk_ptr,
    G: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CROSS_CHUNK: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradients of the values and of all their weights; a program has one tile of one of them.

        da = dmixed v^T      dq = dmixed m^T      dk = v dkv^T      dV = (a^T dmixed + kt^T dkv + far) silu'(V + bias)

    Grid    [tiles of da, then of dq, of dk (CROSS_CHUNK 0 only) and of dV; B G]. All programs of a chunk run at about
            the same time, so that what several of them read comes from memory once.
    Tile    [SIDE, SIDE] of da, dq and dk, sums in steps of INNER; [BLOCK_M, BLOCK_E] of dV, sums in steps of BLOCK_K
    Reads   V, the columns from E to 2 E of p [B, G, C, W]; v and dmixed [B, G, C, E]; a [B, G, C, WINDOW C]; kt = k^T
            [B, G, F, C]; m and dkv [B, G, F, E]. With CROSS_CHUNK kt is x of the chunk that reads, m is v and dkv is
            dmixed of that chunk. far [B, G, C, E] if FAR: the gradient of v from far chunks.
    Writes  da [B, G, C, WINDOW C]; dq and dk [B, G, C, F]; with CROSS_CHUNK dq is dx and there is no dk. The columns
            from E on of dp [B, G, C, W]: dV, then zeros in those of others; dp holds dU already (it takes over the
            buffer of `unused_ptr`). dbias [B G, C / BLOCK_M, E], the sums of dV over the tokens of a tile.
    Bytes   1.1 GB a layer: V, v, dmixed, a, kt, m, dkv; dV, da, dq, dk and the other columns of dp; 1.3 GB with far
    """
    across: tl.constexpr = (C + SIDE - 1) // SIDE
    across_f: tl.constexpr = (F + SIDE - 1) // SIDE
    # Those on the chunk before first.
    across_a: tl.constexpr = WINDOW * across
    squares: tl.constexpr = across * (across_a + across_f * (2 if CROSS_CHUNK == 0 else 1))
    number = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    if number < squares:
        # One loop for the three of them: each of its own would have shared memory of its own.
        x_ptr, y_ptr, end = dmixed_ptr + chunk * C * E, v_ptr + chunk * C * E, E
        if number < across * across_a:
            row, col = number // across_a, number % across_a
            if CAUSAL:
                # Above the diagonal are zeros.
                end = tl.where(col <= row + (WINDOW - 1) * across, E, 0)
            before = 0
            if WINDOW == 2:
                # As they are where there is no chunk before.
                before = (col < across).to(tl.int32)
                end = tl.where((before == 1) & (chunk % G == 0), 0, end)
                col %= across
            y_ptr = v_ptr + (chunk - before) * C * E
            z_ptr, width, stride = da_ptr + chunk * C * WINDOW * C + (WINDOW - 1 - before) * C, C, WINDOW * C
        elif number < across * (across_a + across_f):
            number -= across * across_a
            row, col = number // across_f, number % across_f
            reader, source, read = _what_is_read(chunk, G, F, WINDOW, CROSS_CHUNK)
            y_ptr, z_ptr, width, stride = m_ptr + source * F * E, dq_ptr + reader * C * F, F, F
            end = tl.where(read > 0, E, 0)
            if WINDOW == 1:
                # The first of two chunks may read nothing, and then has no place in dq.
                width = tl.where(read > 0, F, 0)
        else:
            number -= across * (across_a + across_f)
            row, col = number // across_f, number % across_f
            x_ptr, y_ptr = v_ptr + chunk * C * E, dkv_ptr + chunk * F * E
            z_ptr, width, stride = dk_ptr + chunk * C * F, F, F
            if WINDOW == 2:
                end = tl.where(chunk % G < G - 2, E, 0)
        _store_matmul(x_ptr, y_ptr, z_ptr, row, col, end, width, stride, C, E, PRECISION, SIDE, INNER)
    else:
        _store_value_gradient(
            p_ptr, bias_ptr, a_ptr, kt_ptr, dmixed_ptr, dkv_ptr, far_ptr, dp_ptr, dbias_ptr, number - squares, chunk,
            G, C, F, E, W, CAUSAL, WINDOW, CROSS_CHUNK, FAR, PRECISION, BLOCK_M, BLOCK_K, BLOCK_E,
        )  # fmt: skip


@triton.jit
def _store_matmul(
    x_ptr, y_ptr, z_ptr, row, col, end, width, stride,
    ROWS: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Stores a tile of z = x y^T, [ROWS, width] in rows of `stride`, of x [ROWS, E] and y [width, E] up to `end`."""
    i = row * SIDE + tl.arange(0, SIDE)
    j = col * SIDE + tl.arange(0, SIDE)
    z = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, end, INNER):
        e = start + tl.arange(0, INNER)
        x = load_tile(x_ptr, i, e, E, ROWS, E)  # [SIDE, INNER]
        y = load_tile(y_ptr, j, e, E, width, E)  # [SIDE, INNER]
        # [SIDE, INNER] @ [INNER, SIDE]
        z = tl.dot(x, tl.trans(y), z, input_precision=PRECISION)
    store_tile(z_ptr, z, i, j, stride, ROWS, width)


@triton.jit
def _store_value_gradient(
    p_ptr, bias_ptr, a_ptr, kt_ptr, dmixed_ptr, dkv_ptr, far_ptr, dp_ptr, dbias_ptr, number, chunk,
    G: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CROSS_CHUNK: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Stores tile `number` of dV of a chunk, its sum over tokens, and zeros in the columns of p that others read."""
    down: tl.constexpr = (C + BLOCK_M - 1) // BLOCK_M
    across_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    m = (number % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = (number // down) * BLOCK_E + tl.arange(0, BLOCK_E)
    x = load_tile(p_ptr + chunk * C * W + E, m, e, W, C, E)  # [BM, BE]
    dv = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if FAR:
        dv = load_tile(far_ptr + chunk * C * E, m, e, E, C, E).to(tl.float32)  # [BM, BE]
    begin, end = 0, C
    if CAUSAL:
        begin = (number % down) * BLOCK_M
    if WINDOW == 2:
        # The tokens of the next chunk come after those of this one.
        end = tl.where(chunk % G < G - 1, 2 * C, C)
    # What others made of these values, and what their own chunk made, in one loop.
    reader, source, width = chunk, chunk, F
    if WINDOW == 2:
        width = F * (chunk % G < G - 2).to(tl.int32)
    elif CROSS_CHUNK > 0:
        source = chunk ^ 1
        reader, _, width = _what_is_read(source, G, F, WINDOW, CROSS_CHUNK)
    blocks = tl.cdiv(width, BLOCK_K)
    for i in range(0, blocks + tl.cdiv(end - begin, BLOCK_K)):
        own = i >= blocks
        c = tl.where(own, begin + (i - blocks) * BLOCK_K, i * BLOCK_K) + tl.arange(0, BLOCK_K)
        rows = tl.where(own, end, F)
        weights_ptr = tl.where(own, a_ptr + chunk * C * WINDOW * C, kt_ptr + reader * F * C)
        if WINDOW == 2:
            # Each token has two rows of C weights: of them the second is on its own chunk, the first on that before.
            weights_row, weights_rows = tl.where(own, 2 * c + (c < C), c), tl.where(own, 2 * end, F)
            weights = load_tile(weights_ptr, weights_row, m, C, weights_rows, C)  # [BK, BM]
        else:
            weights = load_tile(weights_ptr, c, m, C, rows, C)  # [BK, BM]
        made_ptr = tl.where(own, dmixed_ptr + chunk * C * E, dkv_ptr + source * F * E)
        made = load_tile(made_ptr, c, e, E, rows, E)  # [BK, BE]
        # [BM, BK] @ [BK, BE]
        dv = tl.dot(tl.trans(weights), made, dv, input_precision=PRECISION)
    dv *= silu_gradient(x.to(tl.float32) + _load_bias(bias_ptr + E, e, E))
    store_tile(dp_ptr + chunk * C * W + E, dv, m, e, W, C, E)
    tl.store(dbias_ptr + (chunk * down + number % down) * E + e, tl.sum(dv, axis=0), mask=e < E)
    for start in range((number // down) * BLOCK_E, W - 2 * E, across_e * BLOCK_E):
        w = 2 * E + start + tl.arange(0, BLOCK_E)
        store_tile(dp_ptr + chunk * C * W, tl.zeros((BLOCK_M, BLOCK_E), tl.float32), m, w, W, C, W)
