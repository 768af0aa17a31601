"""Triton kernels that only long blocks of a prompt have (`gau.ops.kernels.prefill_long` says what they are); R = B G C.

U and V come from the library, p = x Wuv without norm, bias and silu, which those who read them add.
"""

import triton
import triton.language as tl

from gau.ops.kernels.decay_gate_triton import log_decays
from gau.ops.kernels.gates_triton import silu
from gau.ops.kernels.load_store import in_bounds, load_tile, store_tile
from gau.ops.kernels.norm_triton import row_scales
from gau.ops.kernels.prefill_chunks_triton import store_roles


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
def prefill_roles_kernel(
    x_ptr, g_ptr, scales_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, mix_ptr, old_before_ptr,
    length_ptr, roles_ptr, before_ptr,
    R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ROPE: tl.constexpr, SHIFTED: tl.constexpr,
    EPSILON: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """z = silu(h Wz + b) for h = ScaleNorm(x); q, k, q_lin, k_lin = rope(z gamma + beta).

    What tiles of z do in `prefill_projections_kernel`, with scales [R] for the norm.

    Grid    [(S / 2) / BLOCK_H, R / BLOCK_M]
    Tile    two of [BLOCK_M, BLOCK_H], columns that the rotation pairs; sums in steps of BLOCK_K
    Reads   x [R, D], scales [R], z [D, S], and the rest
    Writes  roles [4, R, S]; if SHIFTED, z of the last token of each sequence [R / T, S]
    Bytes   x, 25 MB, and roles, 17 MB, of 16,384 tokens
    """
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = row_scales(x_ptr, g_ptr, scales_ptr, row, R, D, EPSILON, True, BLOCK_M, BLOCK_K)[:, None]
    store_roles(
        x_ptr, g_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, mix_ptr, old_before_ptr, length_ptr,
        scales_ptr, roles_ptr, before_ptr, row, scale, tl.program_id(0),
        R, T, D, S, ROPE, SHIFTED, True, EPSILON, PRECISION, BLOCK_M, BLOCK_K, BLOCK_H,
    )  # fmt: skip


@triton.jit
def _store_for_chunk(
    m_ptr, sum_ptr, count_ptr, state_scale_ptr, state, count, b, g, complete, s, e,
    G: tl.constexpr, S: tl.constexpr, E: tl.constexpr, GATED: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Stores what chunk g of row b reads, if there is one; and, if the chunks before it are complete, the new state."""
    if GATED:
        state_scale = 1.0
        if MEAN:
            state_scale = 1.0 / tl.where(count > 0, count, 1.0)
    else:
        state_scale = tl.load(state_scale_ptr + b * G + tl.minimum(g, G - 1))
    mask = (s < tl.where(g < G, S, 0))[:, None] & (e < E)[None, :]
    m = (state * state_scale).to(m_ptr.dtype.element_ty)
    tl.store(m_ptr + (b * G + g) * S * E + s[:, None] * E + e[None, :], m, mask=mask)
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
    p_ptr, scales_ptr, bias_ptr, roles_ptr, before_ptr, length_ptr, state_scale_ptr, logits_ptr,
    old_sum_ptr, old_k_lin_ptr, old_v_ptr, old_gate_ptr, old_count_ptr, ends_ptr, end_factors_ptr, made_v_ptr,
    m_ptr, sum_ptr, count_ptr, v_ptr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr,
    NEAR: tl.constexpr, GATED: tl.constexpr, MEAN: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """m[g] = state_scale M[g], M[g + 1] = d M[g] + k_lin^T v with d, k_lin and v of chunk g; M[0] is the state's sum.

    With NEAR 2 those of chunk g - 1, and for g = 0 those of the chunk before the block, which the state has. The new
    sum is M[n] for the n chunks that are complete. d is 1, but if GATED what the gate makes of a chunk; count then goes
    as M does, with C for k_lin^T v, and state_scale is 1 / count.

    Chunks are cut into PARTS, which are scanned side by side. If there are several, a first launch, ENDS, makes v and
    leaves M at the end of each part, begun with zeros, where m is; the second one finds v at `made_v`, and at `ends`
    what it begins with when it is put together.

    Grid    [E / BLOCK_E, PARTS, B]
    Tile    M [S, BLOCK_E] in registers, BLOCK_C tokens at a time
    Reads   of p [R, 2 E] V, with scales [R] and bias [2 E], or v [R, E]; of roles [4, R, S] k_lin; before and length
            [B], chunks before the block and its tokens; state_scale [B, G]; if GATED logits [R]; sum [B, S, E], and
            with NEAR 2 k_lin [B, 2 C, S], v [B, 2 C, E], gate [B, 2 C]; count [B]; ends [B, PARTS, S, E] and factors
            [2, B, PARTS], of a part's d the product, and count at its end
    Writes  m [B, G, S, E], the new sum and count; if ENDS, in their place ends and, into `count`, factors; whoever
            reads V v = silu(V scale + bias) [R, E]
    Bytes   16,384 tokens in chunks of 128: k_lin and V or v, 55 MB; m, 50 MB, or v and ends, 63 MB
    """
    makes_v: tl.constexpr = ENDS or PARTS == 1
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
    bias = load_tile(bias_ptr, tl.arange(0, 1), E + e, 2 * E, None, 2 * E).to(tl.float32)  # [1, BE]
    first = part * length
    # With NEAR 2 the last chunk has no reader here, but values.
    end = tl.minimum(first + length, G) + tl.where(part == PARTS - 1, NEAR - 1, 0)
    if NEAR == 2:
        if part == 0:
            if not ENDS:
                _store_for_chunk(
                    m_ptr, sum_ptr, count_ptr, state_scale_ptr, state, count, b, first, complete, s, e,
                    G, S, E, GATED, MEAN,
                )  # fmt: skip
            if before > 0:
                decay = 1.0
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
    decay = 1.0
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
        if makes_v:
            scale = tl.load(scales_ptr + row + j, mask=in_bounds(j, keys), other=0.0)
            v = load_tile(p_ptr + row * 2 * E + E, j, e, 2 * E, keys, cols)  # [BC, BE]
            v = silu(v.to(tl.float32) * scale[:, None] + bias).to(k_lin.dtype)
            store_tile(v_ptr + row * E, v, j, e, E, keys, cols)
        else:
            v = load_tile(made_v_ptr + row * E, j, e, E, keys, cols)
        # [BS, BC] @ [BC, BE]
        state = tl.dot(tl.trans(k_lin), v, state, input_precision=PRECISION)
    if ENDS:
        place = b * PARTS + part
        store_tile(m_ptr + place * S * E, state, s, e, E, S, E)
        is_first = tl.program_id(0) == 0
        tl.store(count_ptr + place, product, mask=is_first)
        tl.store(count_ptr + batch * PARTS + place, count, mask=is_first)
    elif part == PARTS - 1 + (NEAR - 1):
        # (With NEAR 2 the last step has done it.)
        _store_new(sum_ptr, count_ptr, state, count, b, G, complete, s, e, S, E, GATED)


@triton.jit
def prefill_weights_kernel(
    roles_ptr, before_ptr, old_k_ptr, bias_ptr, a_ptr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr, SCORE_SCALE: tl.constexpr,
    OVER_VISIBLE: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """a = relu(q.k score_scale + bias)^2 weight_scale in the own chunk; with NEAR 2 on the chunk before as well, first.

    Grid    [C / BLOCK_M, NEAR C / BLOCK_N, B G]
    Tile    [BLOCK_M, BLOCK_N]
    Reads   of roles [4, R, S] q and k; before [B], chunks before the block; with NEAR 2 k [B, 2 C, S] of the state for
            the first chunk; bias [2 NEAR C - 1], if BIAS
    Writes  a [R, NEAR C]
    Bytes   q, k and a, 17 MB of 16,384 tokens
    """
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(2).to(tl.int64)
    g, b, own = chunk % G, chunk // G, chunk * C
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (tl.program_id(1) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    # In chunks from the own one: 0, or with NEAR 2 also -1.
    side = tl.program_id(1) // blocks - (NEAR - 1)
    before = tl.minimum(tl.load(before_ptr + b) + g, NEAR - 1)
    k_ptr = roles_ptr + (R + own + side * C) * S
    if NEAR == 2:
        k_ptr = tl.where((side < 0) & (g == 0), old_k_ptr + b * 2 * C * S, k_ptr)
    q = load_tile(roles_ptr + own * S, i, s, S, C, S)  # [BM, BS]
    k = load_tile(k_ptr, j, s, S, C, S)  # [BN, BS]
    distance = j[None, :] + side * C - i[:, None]
    # All keys of the chunk before, where there is one.
    seen = (distance <= 0) & (i < C)[:, None] & (j < tl.where(before + side >= 0, C, 0))[None, :]
    visible = (before * C + i + 1).to(tl.float32)[:, None]
    # [BM, BS] @ [BS, BN]
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCORE_SCALE
    if OVER_VISIBLE == 1:
        x /= visible
    if BIAS:
        x += tl.load(bias_ptr + distance + NEAR * C - 1, mask=seen, other=0.0).to(tl.float32)
    r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    a = tl.where(seen, r * r, 0.0)
    if OVER_VISIBLE == 2:
        a /= visible
    store_tile(a_ptr + own * NEAR * C + (side + NEAR - 1) * C, a, i, j, NEAR * C, C, C)


@triton.jit
def prefill_mix_kernel(
    p_ptr, scales_ptr, bias_ptr, v_ptr, old_v_ptr, a_ptr, roles_ptr, m_ptr, before_ptr, o_ptr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, NEAR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = silu(U scale + bias) (a v + q_lin m).

    Grid    [C / BLOCK_M, E / BLOCK_E, B G]
    Tile    o [BLOCK_M, BLOCK_E], sums in steps of BLOCK_K
    Reads   of p [R, 2 E] U, with scales [R] and bias [2 E]; v [R, E]; with NEAR 2 v [B, 2 C, E] of the state for the
            first chunk; a [R, NEAR C]; of roles [4, R, S] q_lin; m [B, G, S, E]; before [B], chunks before the block
    Writes  o [R, E]
    Bytes   U, v, m and o, 201 MB of 16,384 tokens in chunks of 128, a, 8 MB, and q_lin, 4 MB
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    g, b, own = chunk % G, chunk // G, chunk * C
    # Before the matmuls, so that they have arrived when these are done.
    u = load_tile(p_ptr + own * 2 * E, i, e, 2 * E, C, E)  # [BM, BE]
    scale = tl.load(scales_ptr + own + i, mask=i < C, other=0.0)
    chunks_before = tl.load(before_ptr + b) + g
    far = tl.where(chunks_before > NEAR - 1, (S + BLOCK_K - 1) // BLOCK_K, 0)
    near = far
    near_v_ptr = v_ptr
    if NEAR == 2:
        near += tl.where(chunks_before > 0, (C + BLOCK_K - 1) // BLOCK_K, 0)
        near_v_ptr = tl.where(g == 0, old_v_ptr + b * 2 * C * E, v_ptr + (own - C) * E)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, C)
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    # The state, the chunk before and the own one in one loop, so that its pipeline fills once.
    for step in range(0, near + tl.cdiv(end, BLOCK_K)):
        of_state = step < far
        of_own = step >= near
        k = (step - tl.where(of_own, near, tl.where(of_state, 0, far))) * BLOCK_K + tl.arange(0, BLOCK_K)
        size = tl.where(of_state, S, C)
        near_ptr = a_ptr + own * NEAR * C + tl.where(of_own, (NEAR - 1) * C, 0)
        weights_ptr = tl.where(of_state, roles_ptr + (2 * R + own) * S, near_ptr)
        weights = load_tile(weights_ptr, i, k, tl.where(of_state, S, NEAR * C), C, size)  # [BM, BK]
        value_ptr = tl.where(of_own, v_ptr + own * E, near_v_ptr)
        value_ptr = tl.where(of_state, m_ptr + chunk * S * E, value_ptr)
        x = load_tile(value_ptr, k, e, E, size, E)  # [BK, BE]
        # [BM, BK] @ [BK, BE]
        mixed = tl.dot(weights, x, mixed, input_precision=PRECISION)
    bias = load_tile(bias_ptr, tl.arange(0, 1), e, 2 * E, None, E).to(tl.float32)  # [1, BE]
    gate = silu(u.to(tl.float32) * scale[:, None] + bias)
    store_tile(o_ptr + own * E, mixed * gate, i, e, E, C, E)
