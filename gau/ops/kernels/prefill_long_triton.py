"""Triton kernels that only long blocks of a prompt have, beside `gau.ops.kernels.prefill_chunks_triton`: R = B G C.

The factors of the rows' norms, which there each tile would find again; the state that each chunk reads, and the one at
the end, made of what the projections' kernel writes.
"""

import triton
import triton.language as tl

from gau.ops.kernels.decay_gate_triton import log_decays
from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def prefill_scales_kernel(
    x_ptr, g_ptr, gate_w_ptr, gate_bias_ptr, scales_ptr, logits_ptr,
    R: tl.constexpr, D: tl.constexpr, GATED: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scales = g / rms(x), the factors of ScaleNorm; and logits of the gate.

    Grid    [R / BLOCK_M]
    Tile    whole rows, [BLOCK_M, BLOCK_D]
    Reads   x [R, D]; g; if GATED w [D] and a bias
    Writes  scales [R]; if GATED logits [R]
    Bytes   x, 25 MB of 16,384 tokens
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    x = load_tile(x_ptr, row, d, D, R, D).to(tl.float32)  # [BM, BD]
    scale = tl.load(g_ptr) / tl.sqrt(tl.sum(x * x, axis=1) / D + EPSILON)
    tl.store(scales_ptr + row, scale, mask=row < R)
    if GATED:
        # Rounded to the type of x, as `gate_logits` does.
        w = tl.load(gate_w_ptr + d, mask=d < D, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        logits = tl.sum(x * w[None, :], axis=1) * scale + tl.load(gate_bias_ptr)
        tl.store(logits_ptr + row, logits, mask=row < R)


@triton.jit
def _store_for_chunk(
    m_ptr, sum_ptr, count_ptr, state_scale_ptr, state, count, b, g, complete, s, e,
    G: tl.constexpr, S: tl.constexpr, E: tl.constexpr, GATED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Stores what chunk g of row b reads; and, if it is the first that is not complete, the row's new state."""
    if GATED:
        state_scale = 1.0
        if MEAN:
            state_scale = 1.0 / tl.where(count > 0, count, 1.0)
    else:
        state_scale = tl.load(state_scale_ptr + b * G + g)
    store_tile(m_ptr + (b * G + g) * S * E, state * state_scale, s, e, E, S, E)
    _store_new(sum_ptr, count_ptr, state, count, b, g, complete, s, e, S, E, GATED)


@triton.jit
def _store_new(
    sum_ptr, count_ptr, state, count, b, g, complete, s, e, S: tl.constexpr, E: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    rows = tl.where(complete == g, S, 0)
    mask = (s < rows)[:, None] & (e < E)[None, :]
    tl.store(sum_ptr + b * S * E + s[:, None] * E + e[None, :], state, mask=mask)
    if GATED:
        tl.store(count_ptr + b, count, mask=tl.program_id(0) < tl.minimum(rows, 1))


@triton.jit
def prefill_states_kernel(
    activations_ptr, roles_ptr, before_ptr, length_ptr, state_scale_ptr, logits_ptr,
    old_sum_ptr, old_k_lin_ptr, old_v_ptr, old_gate_ptr, old_count_ptr, ends_ptr, end_factors_ptr,
    m_ptr, sum_ptr, count_ptr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr,
    DECAY: tl.constexpr, NEAR: tl.constexpr, GATED: tl.constexpr, MEAN: tl.constexpr, ENDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """m[g] = state_scale M[g], M[g + 1] = d M[g] + k_lin^T v with d, k_lin and v of chunk g; M[0] is the state's sum.

    With NEAR 2 those of chunk g - 1, and for g = 0 those of the chunk before the block, which the state has. The new
    sum is M[n] for the n chunks that are complete. If GATED each chunk has a d of its own, and count goes as M does,
    with C for k_lin^T v; state_scale is 1 / count.

    Chunks are cut into PARTS, which are scanned side by side. A first launch, ENDS, leaves M at the end of each part,
    begun with zeros, where m is; the second one finds them at `ends` and begins with what they make together.

    Grid    [E / BLOCK_E, PARTS, B]; if ENDS one part less
    Tile    M [S, BLOCK_E] in registers, BLOCK_C tokens at a time
    Reads   of activations [R, 2 E] v; of roles [4, R, S] k_lin; before and length [B], chunks before the block and its
            tokens; state_scale [B, G]; if GATED logits [R]; sum [B, S, E], and with NEAR 2 k_lin [B, 2 C, S],
            v [B, 2 C, E], gate [B, 2 C]; count [B]; ends [B, PARTS, S, E] and factors [2, B, PARTS], of a part's d the
            product, and count at its end
    Writes  m [B, G, S, E] and the new sum and count; if ENDS, in their place ends and, into `count`, factors
    Bytes   16,384 tokens in chunks of 128: v and k_lin, 55 MB, and m, 50 MB; if ENDS 48 MB and 6 MB
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    keys: tl.constexpr = None if C % BLOCK_C == 0 else C
    width: tl.constexpr = None if S == BLOCK_S else S
    cols: tl.constexpr = None if E % BLOCK_E == 0 else E
    length: tl.constexpr = (G + PARTS - 1) // PARTS
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    before = tl.load(before_ptr + b)
    complete = tl.load(length_ptr + b) // C
    batch = tl.num_programs(2)
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    count = tl.full((), 0.0, tl.float32)
    product = tl.full((), 1.0, tl.float32)
    if not ENDS:
        if before > NEAR - 1:
            state = load_tile(old_sum_ptr + b * S * E, s, e, E, S, cols).to(tl.float32)  # [BS, BE]
        if GATED:
            count = tl.load(old_count_ptr + b)
        for earlier in range(0, part):
            place = b * PARTS + earlier
            factor = tl.load(end_factors_ptr + place)
            state = state * factor + load_tile(ends_ptr + place * S * E, s, e, E, S, cols)
            if GATED:
                count = count * factor + tl.load(end_factors_ptr + batch * PARTS + place)
    first = part * length
    end = tl.minimum(first + length, G)
    if NEAR == 2:
        if part == 0:
            if not ENDS:
                _store_for_chunk(
                    m_ptr, sum_ptr, count_ptr, state_scale_ptr, state, count, b, first, complete, s, e,
                    G, S, E, GATED, MEAN,
                )  # fmt: skip
            if before > 0:
                decay = DECAY
                if GATED:
                    decay = tl.exp2(tl.sum(log_decays(old_gate_ptr + b * 2 * C, 1, C, 1, BLOCK_L), axis=0))
                state *= decay
                count = count * decay + C
                product *= decay
                for start in range(0, C, BLOCK_C):
                    k_lin = load_tile(old_k_lin_ptr + b * 2 * C * S, start + c, s, S, keys, width)  # [BC, BS]
                    v = load_tile(old_v_ptr + b * 2 * C * E, start + c, e, E, keys, cols)  # [BC, BE]
                    # [BS, BC] @ [BC, BE]
                    state = tl.dot(tl.trans(k_lin), v, state, input_precision=PRECISION)
        first = tl.maximum(first, 1)
    decay = DECAY
    if GATED:
        # Of all chunks of the part at once: in the loop it would be a reduction over its threads for each of them.
        chunk = tl.arange(0, BLOCK_G)
        logits_ptr += (b * G + first - (NEAR - 1)) * C
        logs = log_decays(logits_ptr, end - first, C, BLOCK_G, BLOCK_L)  # [BG]
    for i in range(first * blocks, end * blocks):
        g = i // blocks
        row = b * G * C + (g - (NEAR - 1)) * C
        if i % blocks == 0:
            if not ENDS:
                _store_for_chunk(
                    m_ptr, sum_ptr, count_ptr, state_scale_ptr, state, count, b, g, complete, s, e,
                    G, S, E, GATED, MEAN,
                )  # fmt: skip
            if GATED:
                decay = tl.exp2(tl.sum(tl.where(chunk == g - first, logs, 0.0), axis=0))
            state *= decay
            count = count * decay + C
            product *= decay
        j = (i % blocks) * BLOCK_C + c
        k_lin = load_tile(roles_ptr + (3 * R + row) * S, j, s, S, keys, width)  # [BC, BS]
        v = load_tile(activations_ptr + row * 2 * E + E, j, e, 2 * E, keys, cols)  # [BC, BE]
        # [BS, BC] @ [BC, BE]
        state = tl.dot(tl.trans(k_lin), v, state, input_precision=PRECISION)
    if ENDS:
        place = b * PARTS + part
        store_tile(m_ptr + place * S * E, state, s, e, E, S, E)
        is_first = tl.program_id(0) == 0
        tl.store(count_ptr + place, product, mask=is_first)
        tl.store(count_ptr + batch * PARTS + place, count, mask=is_first)
    elif part == PARTS - 1:
        _store_new(sum_ptr, count_ptr, state, count, b, G, complete, s, e, S, E, GATED)
