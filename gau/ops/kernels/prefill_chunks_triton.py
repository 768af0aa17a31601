"""Triton kernels of a block of a prompt in a FLASH layer (`gau.ops.kernels.prefill_chunks` says what they are).

A short prompt is over before a CPU has launched the kernels of training: here there are three. Weights of the global
branch are made of queries and keys, as those inside a chunk are, and no state of a chunk is written or read but the one
that the block begins and ends with. Long blocks have `prefill_long_triton` in the place of the first two, and STATES in
the last. Rows are the tokens of all sequences, R = B G C.

Bytes are of size base (D = 768, E = 1,536, S = 128, C = 256) with 1,024 tokens in bfloat16. All of them stay in the
cache but for the weights, 7.3 MB a layer, and the state, 1.7 MB.
"""

import triton
import triton.language as tl

from gau.ops.kernels.decay_gate_triton import gate_logits, weights_of_chunks
from gau.ops.kernels.gates_triton import silu
from gau.ops.kernels.load_store import load_tile, store_tile
from gau.ops.kernels.norm_triton import row_scales


@triton.jit
def _z_halves(
    x_ptr, z_ptr, z_bias_ptr, row, half, scale, R: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Returns silu(x Wz scale + b) of these rows, columns of both halves of S, float32 [BLOCK_M, BLOCK_H] each."""
    H: tl.constexpr = (S + 1) // 2
    rows: tl.constexpr = None if R % BLOCK_M == 0 else R
    depth: tl.constexpr = None if D % BLOCK_K == 0 else D
    only = tl.arange(0, 1)
    z1 = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    z2 = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, row, d, D, rows, depth)  # [BM, BK]
        w1 = load_tile(z_ptr, d, half, S, depth, H)  # [BK, BH]
        w2 = load_tile(z_ptr + H, d, half, S, depth, S - H)  # [BK, BH]
        # [BM, BK] @ [BK, BH]
        z1 = tl.dot(x, w1, z1, input_precision=PRECISION)
        z2 = tl.dot(x, w2, z2, input_precision=PRECISION)
    z1 = z1 * scale + load_tile(z_bias_ptr, only, half, S, None, H).to(tl.float32)
    z2 = z2 * scale + load_tile(z_bias_ptr + H, only, half, S, None, S - H).to(tl.float32)
    return silu(z1), silu(z2)


@triton.jit
def store_roles(
    x_ptr, g_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, mix_ptr, old_before_ptr, length_ptr,
    scales_ptr, roles_ptr, before_ptr, row, scale, tile,
    R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ROPE: tl.constexpr, SHIFTED: tl.constexpr,
    SCALED: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Stores the columns of a tile of z, [BLOCK_M, BLOCK_H] of either half, in q, k, q_lin and k_lin.

    `scale` are the factors of the rows' norm, [BLOCK_M, 1]; if SCALED those of all rows are known. If SHIFTED the last
    z of each sequence is stored too.
    """
    H: tl.constexpr = (S + 1) // 2
    rows: tl.constexpr = None if R % BLOCK_M == 0 else R
    half = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    z1, z2 = _z_halves(
        x_ptr, z_ptr, z_bias_ptr, row, half, scale, R, D, S, PRECISION, BLOCK_M, BLOCK_K, BLOCK_H
    )  # [BM, BH] each
    k1, k2 = z1, z2
    only = tl.arange(0, 1)
    if SHIFTED:
        row_before = tl.maximum(row - 1, 0)
        scale = row_scales(x_ptr, g_ptr, scales_ptr, row_before, R, D, EPSILON, SCALED, BLOCK_M, BLOCK_K)[:, None]
        before1, before2 = _z_halves(
            x_ptr, z_ptr, z_bias_ptr, row_before, half, scale, R, D, S, PRECISION, BLOCK_M, BLOCK_K, BLOCK_H
        )
        sequence = tl.where(row < R, row // T, 0)
        t = row % T
        old1 = load_tile(old_before_ptr, sequence, half, S, None, H).to(tl.float32)
        old2 = load_tile(old_before_ptr + H, sequence, half, S, None, S - H).to(tl.float32)
        before1 = tl.where((t == 0)[:, None], old1, before1)
        before2 = tl.where((t == 0)[:, None], old2, before2)
        k1 += load_tile(mix_ptr, only, half, S, None, H).to(tl.float32) * (before1 - z1)
        k2 += load_tile(mix_ptr + H, only, half, S, None, S - H).to(tl.float32) * (before2 - z2)
        # A sequence without tokens goes on with what it had.
        length = tl.load(length_ptr + sequence)
        is_last = (t == tl.maximum(length - 1, 0)) & (row < R)
        takes = (length > 0)[:, None]
        at = before_ptr + sequence[:, None] * S + half[None, :]
        last1 = tl.where(takes, z1, old1).to(before_ptr.dtype.element_ty)
        last2 = tl.where(takes, z2, old2).to(before_ptr.dtype.element_ty)
        tl.store(at, last1, mask=is_last[:, None] & (half < H)[None, :])
        tl.store(at + H, last2, mask=is_last[:, None] & (half < S - H)[None, :])
    if ROPE:
        cos = load_tile(cos_ptr, row, half, H, rows, H)  # [BM, BH]
        sin = load_tile(sin_ptr, row, half, H, rows, H)
    for role in tl.static_range(4):
        at = role * S
        gamma1 = load_tile(gamma_ptr + at, only, half, S, None, H).to(tl.float32)
        gamma2 = load_tile(gamma_ptr + at + H, only, half, S, None, S - H).to(tl.float32)
        # Every second role is one of keys.
        y1 = (k1 if role % 2 else z1) * gamma1
        y2 = (k2 if role % 2 else z2) * gamma2
        y1 += load_tile(beta_ptr + at, only, half, S, None, H).to(tl.float32)
        y2 += load_tile(beta_ptr + at + H, only, half, S, None, S - H).to(tl.float32)
        if ROPE:
            y1, y2 = y1 * cos - y2 * sin, y2 * cos + y1 * sin
        store_tile(roles_ptr + at * R, y1, row, half, S, rows, H)
        store_tile(roles_ptr + at * R + H, y2, row, half, S, rows, S - H)


@triton.jit
def prefill_projections_kernel(
    x_ptr, g_ptr, uv_ptr, uv_bias_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, mix_ptr,
    gate_w_ptr, gate_bias_ptr, old_before_ptr, length_ptr, activations_ptr, roles_ptr, before_ptr, logits_ptr,
    R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, E: tl.constexpr, S: tl.constexpr, ROPE: tl.constexpr,
    SHIFTED: tl.constexpr, GATED: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[u, v] = silu(h Wuv + b) and z = silu(h Wz + b) for h = ScaleNorm(x); q, k, q_lin, k_lin = rope(z gamma + beta).

    If SHIFTED, keys are made of z mixed with that of the token before. A tile has both: matmuls of its rows and of
    those before them, which are no more than those of a tile of u and v.

    Grid    [2 E / BLOCK_N + (S / 2) / BLOCK_H + GATED, R / BLOCK_M]: tiles of u and v, then of z, then the gate's
    Tile    [BLOCK_M, BLOCK_N]; of z two of [BLOCK_M, BLOCK_H], columns that the rotation pairs; sums in steps of
            BLOCK_K
    Reads   x [R, D]; g; uv [D, 2 E] and z [D, S] with biases, float32; gamma and beta [4, S]; cos and sin [R, S / 2];
            if SHIFTED, mix [S]; z of the token before the T of each sequence [R / T, S]; how many of these are its own
            [R / T]; if GATED, w [D] and a bias
    Writes  activations u and v [R, 2 E]; roles q, k, q_lin, k_lin [4, R, S]; if SHIFTED, z of the last token of each
            sequence [R / T, S]; if GATED, logits [R]
    Bytes   x, 1.6 MB, and the weights, 4.9 MB; activations, 6.3 MB, and roles, 1.0 MB
    """
    H: tl.constexpr = (S + 1) // 2
    tiles: tl.constexpr = (2 * E + BLOCK_N - 1) // BLOCK_N
    tiles_of_z: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    rows: tl.constexpr = None if R % BLOCK_M == 0 else R
    depth: tl.constexpr = None if D % BLOCK_K == 0 else D
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Before the matmul, whose loads are pipelined for its factors alone.
    scale = row_scales(x_ptr, g_ptr, g_ptr, row, R, D, EPSILON, False, BLOCK_M, BLOCK_K)[:, None]
    if tl.program_id(0) < tiles:
        cols: tl.constexpr = None if 2 * E % BLOCK_N == 0 else 2 * E
        col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        bias = load_tile(uv_bias_ptr, tl.arange(0, 1), col, 2 * E, None, cols).to(tl.float32)  # [1, BN]
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_K):
            d = start + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, row, d, D, rows, depth)  # [BM, BK]
            w = load_tile(uv_ptr, d, col, 2 * E, depth, cols)  # [BK, BN]
            # [BM, BK] @ [BK, BN]
            product = tl.dot(x, w, product, input_precision=PRECISION)
        store_tile(activations_ptr, silu(product * scale + bias), row, col, 2 * E, rows, cols)
    elif tl.program_id(0) >= tiles + tiles_of_z:
        if GATED:
            logits = gate_logits(x_ptr, g_ptr, gate_w_ptr, gate_bias_ptr, row, R, D, EPSILON, BLOCK_M, BLOCK_K)
            tl.store(logits_ptr + row, logits, mask=row < R)
    else:
        store_roles(
            x_ptr, g_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, mix_ptr, old_before_ptr, length_ptr,
            g_ptr, roles_ptr, before_ptr, row, scale, tl.program_id(0) - tiles,
            R, T, D, S, ROPE, SHIFTED, False, EPSILON, PRECISION, BLOCK_M, BLOCK_K, BLOCK_H,
        )  # fmt: skip


@triton.jit
def prefill_attention_kernel(
    activations_ptr, roles_ptr, sum_ptr, bias_ptr, before_ptr, state_scale_ptr, logits_ptr, count_ptr, o_ptr,
    R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, BIAS: tl.constexpr,
    SCORE_SCALE: tl.constexpr, OVER_VISIBLE: tl.constexpr, NEAR: tl.constexpr, GATED: tl.constexpr,
    MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """o = u (a v + w v' + state_scale q_lin sum), v' of the chunks of the block before the own one.

    a = relu(q.k score_scale + bias)^2 weight_scale in the own chunk. w = state_scale q_lin.k_lin. If GATED, w and the
    sum have the decays of the chunks that lie between as factors, and state_scale follows from them. With NEAR 2 a is
    on the chunk before as well, and w and the sum are of the chunks before both; sequences begin with the block.

    Grid    [E / BLOCK_E, G C / BLOCK_M, B]: the last tokens first, which have the most to read
    Tile    [BLOCK_M, BLOCK_E] of a chunk, sums over BLOCK_N keys at a time
    Reads   activations [R, 2 E]; roles [4, R, S]; sum [B, S, E], if there is anything in it; bias [2 NEAR C - 1], if
            BIAS; before [B], chunks before the block; state_scale [B, G]; if GATED logits [R] and count [B], the tokens
            in sum by weight
    Writes  o [R, E]
    Bytes   activations, roles and o, 10 MB
    """
    tiles: tl.constexpr = (C + BLOCK_M - 1) // BLOCK_M
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    queries: tl.constexpr = None if C % BLOCK_M == 0 else C
    keys: tl.constexpr = None if C % BLOCK_N == 0 else C
    width: tl.constexpr = None if S == BLOCK_S else S
    cols: tl.constexpr = None if E % BLOCK_E == 0 else E
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    g = number // tiles
    i = (number % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(2).to(tl.int64)
    first = b * G * C
    own = first + g * C
    # Before the matmuls, so that it has arrived when they are done.
    u = load_tile(activations_ptr + own * 2 * E, i, e, 2 * E, queries, cols)  # [BM, BE]
    state_scale = tl.load(state_scale_ptr + b * G + g)
    far = g - (NEAR - 1)
    sum_scale = state_scale
    chunk = tl.arange(0, BLOCK_G)
    if GATED:
        logs, weights = weights_of_chunks(logits_ptr + first, far, C, BLOCK_G, BLOCK_C)  # [BG] each
        kept = tl.exp2(tl.sum(logs, axis=0))
        if MEAN:
            count = kept * tl.load(count_ptr + b) + C * tl.sum(weights, axis=0)
            state_scale = 1.0 / tl.where(count > 0, count, 1.0)
        sum_scale = kept * state_scale
    q_lin_ptr = roles_ptr + (2 * R + own) * S
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if tl.load(before_ptr + b) > 0:
        for start in range(0, S, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            q_lin = load_tile(q_lin_ptr, i, j, S, queries, S)  # [BM, BN]
            m = load_tile(sum_ptr + b * S * E, j, e, E, S, cols).to(q_lin.dtype)  # [BN, BE]
            # [BM, BN] @ [BN, BE]
            mixed = tl.dot(q_lin, m, mixed, input_precision=PRECISION)
        mixed *= sum_scale
    q_lin = load_tile(q_lin_ptr, i, s, S, queries, width)  # [BM, BS]
    for step in range(0, far * blocks):
        row = first + step // blocks * C
        j = (step % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_lin = load_tile(roles_ptr + (3 * R + row) * S, j, s, S, keys, width)  # [BN, BS]
        v = load_tile(activations_ptr + row * 2 * E + E, j, e, 2 * E, keys, cols)  # [BN, BE]
        scale = state_scale
        if GATED:
            scale *= tl.sum(tl.where(chunk == step // blocks, weights, 0.0), axis=0)
        # [BM, BS] @ [BS, BN]
        w = tl.dot(q_lin, tl.trans(k_lin), input_precision=PRECISION) * scale
        # [BM, BN] @ [BN, BE]
        mixed = tl.dot(w.to(v.dtype), v, mixed, input_precision=PRECISION)
    q = load_tile(roles_ptr + own * S, i, s, S, queries, width)  # [BM, BS]
    before = tl.minimum(g, NEAR - 1) * C
    visible = (before + i + 1).to(tl.float32)[:, None]
    for start in range(-before, tl.minimum((number % tiles + 1) * BLOCK_M, C), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_tile(roles_ptr + (R + own) * S, j, s, S, keys, width)  # [BN, BS]
        v = load_tile(activations_ptr + own * 2 * E + E, j, e, 2 * E, keys, cols)  # [BN, BE]
        seen = (j[None, :] <= i[:, None]) & (i < C)[:, None]
        # [BM, BS] @ [BS, BN]
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCORE_SCALE
        if OVER_VISIBLE == 1:
            x /= visible
        if BIAS:
            x += tl.load(bias_ptr + j[None, :] - i[:, None] + NEAR * C - 1, mask=seen, other=0.0).to(tl.float32)
        r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        a = tl.where(seen, r * r, 0.0)
        if OVER_VISIBLE == 2:
            a /= visible
        # [BM, BN] @ [BN, BE]
        mixed = tl.dot(a.to(v.dtype), v, mixed, input_precision=PRECISION)
    store_tile(o_ptr + own * E, u.to(tl.float32) * mixed, i, e, E, queries, cols)


@triton.jit
def prefill_output_kernel(
    o_ptr, w_ptr, bias_ptr, x_ptr, activations_ptr, roles_ptr, length_ptr, logits_ptr,
    new_sum_ptr, new_count_ptr, new_before_ptr,
    old_sum_ptr, old_k_ptr, old_k_lin_ptr, old_v_ptr, old_gate_ptr, old_count_ptr, old_before_ptr,
    y_ptr, sum_ptr, k_ptr, k_lin_ptr, v_ptr, gate_ptr, count_ptr, before_ptr,
    B: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    S: tl.constexpr, NEAR: tl.constexpr, GATED: tl.constexpr, STATES: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = x + o Wo + b; and the state after the block.

    sum gets k_lin v^T of every chunk that is complete; k, k_lin and v are those of the chunk after them. A row that
    takes no tokens keeps its state. If GATED, the decay of a chunk is a factor on the sum before the chunk is added;
    count, the tokens in sum by weight, goes as the sum does, and gate has the logits of the last chunk. With NEAR 2 sum
    is without the last complete chunk, which k, k_lin, v and gate begin with. If STATES v [R, E] stands where
    activations do. What is made already, sum and count if STATES and before if SHIFTED, gets its place in the
    state here, where nobody reads what it was: else the compiler would copy each, in a launch of its own.

    Grid    [B E / BLOCK_E + (R / BLOCK_M) (D / BLOCK_N)]: tiles of the sums, then of y
    Tile    [S, BLOCK_E], sums over BLOCK_K tokens at a time; [BLOCK_M, BLOCK_N], sums in steps of BLOCK_K
    Reads   o [R, E], w [E, D], bias [D], x [R, D]; of activations [R, 2 E] v; of roles [4, R, S] k and k_lin; length
            [B]; sum [B, S, E], float32; if GATED logits [R] and count [B]; `new_*`
    Writes  y [R, D]; sum, k and k_lin [B, C, S], v [B, C, E], gate [B, C], count and before [B, S], which take over the
            buffers of `old_*`
    Bytes   o, 3.1 MB, v, k, k_lin, 3.7 MB, x and y, 3.1 MB, and the weights, 2.4 MB; the state, 1.7 MB
    """
    across_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    # Of long blocks the values are alone.
    v_stride: tl.constexpr = E if STATES else 2 * E
    across: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) - B * across_e
    if tile < 0:
        blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        keys: tl.constexpr = None if C % BLOCK_K == 0 else C
        width: tl.constexpr = None if S == BLOCK_S else S
        cols: tl.constexpr = None if E % BLOCK_E == 0 else E
        across_state = tl.program_id(0) % across_e
        b = (tl.program_id(0) // across_e).to(tl.int64)
        e = across_state * BLOCK_E + tl.arange(0, BLOCK_E)
        s = tl.arange(0, BLOCK_S)
        length = tl.load(length_ptr + b)
        complete = length // C
        first = b * G * C
        if SHIFTED:
            once = s < tl.where(across_state == 0, S, 0)
            tl.store(before_ptr + b * S + s, tl.load(new_before_ptr + b * S + s, mask=once), mask=once)
        if STATES:
            new = load_tile(new_sum_ptr + b * S * E, s, e, E, S, cols)  # [BS, BE]
            store_tile(sum_ptr + b * S * E, new, s, e, E, S, cols)
            if GATED:
                tl.store(count_ptr + b, tl.load(new_count_ptr + b), mask=across_state == 0)
        else:
            total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
            far = tl.maximum(complete - (NEAR - 1), 0)
            kept = 1.0
            chunk = tl.arange(0, BLOCK_G)
            if GATED:
                logs, weights = weights_of_chunks(logits_ptr + first, far, C, BLOCK_G, BLOCK_C)  # [BG] each
                kept = tl.exp2(tl.sum(logs, axis=0))
            for step in range(0, far * blocks):
                row = first + step // blocks * C
                j = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
                k_lin = load_tile(roles_ptr + (3 * R + row) * S, j, s, S, keys, width)  # [BK, BS]
                v = load_tile(activations_ptr + row * 2 * E + E, j, e, 2 * E, keys, cols)  # [BK, BE]
                if GATED:
                    begins = (chunk == step // blocks) & (step % blocks == 0)
                    total *= tl.exp2(tl.sum(tl.where(begins, logs, 0.0), axis=0))
                # [BS, BK] @ [BK, BE]
                total = tl.dot(tl.trans(k_lin), v, total, input_precision=PRECISION)
            if far > 0:
                old = load_tile(sum_ptr + b * S * E, s, e, E, S, cols)  # [BS, BE]
                total += old * kept
                store_tile(sum_ptr + b * S * E, total, s, e, E, S, cols)
                if GATED:
                    count = kept * tl.load(count_ptr + b) + C * tl.sum(weights, axis=0)
                    tl.store(count_ptr + b, count, mask=across_state == 0)
        if length > 0:
            # Of the sequence's tokens the first that the state has, and its place there.
            token = (complete - (NEAR - 1)) * C
            places: tl.constexpr = NEAR * C
            for start in range(0, places, BLOCK_K):
                j = start + tl.arange(0, BLOCK_K)
                mask = (j < places) & (token + j >= 0) & (token + j < G * C)
                row = first + token + j
                to = b * places + j
                mask_e = mask[:, None] & (e < E)[None, :]
                v_at = activations_ptr + row[:, None] * v_stride + (v_stride - E)
                v = tl.load(v_at + e[None, :], mask=mask_e, other=0.0)
                tl.store(v_ptr + to[:, None] * E + e[None, :], v, mask=mask_e)
                if across_state == 0:
                    mask_s = mask[:, None] & (s < S)[None, :]
                    k = tl.load(roles_ptr + (R + row)[:, None] * S + s[None, :], mask=mask_s, other=0.0)
                    tl.store(k_ptr + to[:, None] * S + s[None, :], k, mask=mask_s)
                    k_lin = tl.load(roles_ptr + (3 * R + row)[:, None] * S + s[None, :], mask=mask_s, other=0.0)
                    tl.store(k_lin_ptr + to[:, None] * S + s[None, :], k_lin, mask=mask_s)
                    if GATED:
                        tl.store(gate_ptr + to, tl.load(logits_ptr + row, mask=mask, other=0.0), mask=mask)
    else:
        rows: tl.constexpr = None if R % BLOCK_M == 0 else R
        depth: tl.constexpr = None if E % BLOCK_K == 0 else E
        outs: tl.constexpr = None if D % BLOCK_N == 0 else D
        row = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = load_tile(x_ptr, row, n, D, rows, outs)  # [BM, BN]
        bias = load_tile(bias_ptr, tl.arange(0, 1), n, D, None, outs).to(tl.float32)  # [1, BN]
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, E, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            o = load_tile(o_ptr, row, k, E, rows, depth)  # [BM, BK]
            w = load_tile(w_ptr, k, n, D, depth, outs)  # [BK, BN]
            # [BM, BK] @ [BK, BN]
            product = tl.dot(o, w, product, input_precision=PRECISION)
        store_tile(y_ptr, x.to(tl.float32) + product + bias, row, n, D, rows, outs)
