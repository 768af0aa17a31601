"""Triton kernels of one token in a FLASH layer (`gau.ops.kernels.decode_chunks` says what they compute together).

A token costs reading: every weight of the layer once, the window of the current chunk, and the sum of the chunks before
it. There are three kernels because each needs all of what the one before it writes. Rows of the batch are B in all; in
the matmuls they are the short side of a tile, of which 16 is the least.

Bytes are of size base (D = 768, E = 1,536, S = 128, C = 256) in bfloat16: those of the weights, and of a row's state.
"""

import triton
import triton.language as tl

from gau.ops.kernels.decay_gate_triton import gate_logits, scales_in_window
from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _only(x_RH, own_R1):
    """Returns the row of x that is marked, [1, BLOCK_H]."""
    return tl.sum(tl.where(own_R1, x_RH, 0.0), axis=0)[None, :]


@triton.jit
def _normalised_matmuls(
    x_ptr, w_ptr, other_ptr, g_ptr, b, col, stride: tl.constexpr, COLS: tl.constexpr, OTHER_COLS: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns x w g / rms(x) and the same for `other`, unless it has no columns, float32 [BLOCK_B, BLOCK_N] each.

    ScaleNorm is one factor for a row, taken after the matmul.
    """
    product = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    other = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, d, col, stride, D, COLS)  # [BK, BN]
        x = load_tile(x_ptr, b, d, D, B, D)  # [BB, BK]
        x32 = x.to(tl.float32)
        squares += x32 * x32
        # [BB, BK] @ [BK, BN]
        product = tl.dot(x.to(w.dtype), w, product, input_precision=PRECISION)
        if OTHER_COLS > 0:
            w = load_tile(other_ptr, d, col, stride, D, OTHER_COLS)  # [BK, BN]
            # [BB, BK] @ [BK, BN]
            other = tl.dot(x.to(w.dtype), w, other, input_precision=PRECISION)
    scale = (tl.load(g_ptr) / tl.sqrt(tl.sum(squares, axis=1) / D + EPSILON))[:, None]
    return product * scale, other * scale


@triton.jit
def decode_projections_kernel(
    x_ptr, g_ptr, uv_ptr, uv_bias_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, place_ptr,
    mix_ptr, gate_w_ptr, gate_bias_ptr, old_v_ptr, old_k_ptr, old_k_lin_ptr, old_before_ptr, old_gate_ptr,
    old_far_k_ptr, old_far_v_ptr,
    u_ptr, q_ptr, q_lin_ptr, q_far_ptr, v_ptr, k_ptr, k_lin_ptr, before_ptr, gate_ptr, far_k_ptr, far_v_ptr,
    B: tl.constexpr, D: tl.constexpr, E: tl.constexpr, S: tl.constexpr, PLACES: tl.constexpr, FAR: tl.constexpr,
    ROPE: tl.constexpr, SHIFTED: tl.constexpr, GATED: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[u, v] = silu(h Wuv + b) and z = silu(h Wz + b) for h = ScaleNorm(x); q, k, q_lin, k_lin = rope(z gamma + beta).

    If FAR there are two more of these, q_far and k_far. FAR is how many tokens the state keeps, 0: not all of them.

    Grid    [2 E / BLOCK_N + (S / 2) / BLOCK_H + GATED, B / BLOCK_B]: tiles of u and v, then of z, then the gate's
    Tile    [BLOCK_B, BLOCK_N]; of z two of [BLOCK_B, BLOCK_H], columns that the rotation pairs
    Reads   x [B, D]; g; uv [D, 2 E] and z [D, S] with biases, float32; gamma and beta [4, S], if FAR [6, S]; cos and
            sin [B, S / 2]; place [3, B], where the token stands in the window and (third) in the sequence; if SHIFTED,
            mix [S] and before [B, S], z of the token before; if GATED, w [D] and a bias
    Writes  u [B, E], q and q_lin [B, S]; v [B, PLACES, E], k and k_lin [B, PLACES, S] and gate [B, PLACES], logits, at
            `place`, and before, which take over the buffers of `old_*`; if FAR, q_far [B, S], and far_k [B, FAR, S] and
            far_v [B, FAR, E] at the token's place in the sequence
    Bytes   4.9 MB of weights
    """
    H: tl.constexpr = (S + 1) // 2
    tiles: tl.constexpr = (2 * E + BLOCK_N - 1) // BLOCK_N
    tiles_of_z: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    place = tl.load(place_ptr + b, mask=b < B, other=PLACES)
    written = ((b < B) & (place < PLACES))[:, None]
    row = b.to(tl.int64) * PLACES + place
    far_row = row
    far_written = written
    if FAR > 0:
        start = tl.load(place_ptr + 2 * B + b, mask=b < B, other=FAR)
        far_row = b.to(tl.int64) * FAR + start
        far_written &= (start < FAR)[:, None]
    if tl.program_id(0) < tiles:
        col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        uv, _ = _normalised_matmuls(
            x_ptr, uv_ptr, uv_ptr, g_ptr, b, col, 2 * E, 2 * E, 0, B, D, EPSILON, PRECISION, BLOCK_B, BLOCK_K, BLOCK_N
        )
        uv = _silu(uv + tl.load(uv_bias_ptr + col, mask=col < 2 * E, other=0.0).to(tl.float32)[None, :])
        store_tile(u_ptr, uv, b, col, E, B, E)
        is_v = (col >= E) & (col < 2 * E)
        v_at = v_ptr + row[:, None] * E + (col - E)[None, :]
        tl.store(v_at, uv.to(v_ptr.dtype.element_ty), mask=written & is_v[None, :])
        if FAR > 0:
            far_v_at = far_v_ptr + far_row[:, None] * E + (col - E)[None, :]
            tl.store(far_v_at, uv.to(v_ptr.dtype.element_ty), mask=far_written & is_v[None, :])
    elif tl.program_id(0) >= tiles + tiles_of_z:
        if GATED:
            logits = gate_logits(x_ptr, g_ptr, gate_w_ptr, gate_bias_ptr, b, B, D, EPSILON, BLOCK_B, BLOCK_K)
            tl.store(gate_ptr + row, logits, mask=(b < B) & (place < PLACES))
    else:
        half = (tl.program_id(0) - tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        first = half < H
        second = half < S - H
        # Of q, k, q_lin and k_lin, and q and k of far chunks; asked for before the matmuls, which take longer.
        ROLES: tl.constexpr = 6 if FAR > 0 else 4
        bound: tl.constexpr = 6 if FAR > 0 else None
        role = tl.arange(0, 8 if FAR > 0 else 4)
        gamma1_RH = load_tile(gamma_ptr, role, half, S, bound, H).to(tl.float32)
        gamma2_RH = load_tile(gamma_ptr + H, role, half, S, bound, S - H).to(tl.float32)
        beta1_RH = load_tile(beta_ptr, role, half, S, bound, H).to(tl.float32)
        beta2_RH = load_tile(beta_ptr + H, role, half, S, bound, S - H).to(tl.float32)
        bias1 = tl.load(z_bias_ptr + half, mask=first, other=0.0).to(tl.float32)[None, :]
        bias2 = tl.load(z_bias_ptr + H + half, mask=second, other=0.0).to(tl.float32)[None, :]
        z1, z2 = _normalised_matmuls(
            x_ptr, z_ptr, z_ptr + H, g_ptr, b, half, S, H, S - H, B, D, EPSILON, PRECISION, BLOCK_B, BLOCK_K, BLOCK_H
        )
        z1 = _silu(z1 + bias1)
        z2 = _silu(z2 + bias2)
        if ROPE:
            cos = load_tile(cos_ptr, b, half, H, B, H)  # [BB, BH]
            sin = load_tile(sin_ptr, b, half, H, B, H)
        k1, k2 = z1, z2
        if SHIFTED:
            before1 = load_tile(before_ptr, b, half, S, B, H).to(tl.float32)  # [BB, BH]
            before2 = load_tile(before_ptr + H, b, half, S, B, S - H).to(tl.float32)  # [BB, BH]
            k1 += tl.load(mix_ptr + half, mask=first, other=0.0)[None, :] * (before1 - z1)
            k2 += tl.load(mix_ptr + H + half, mask=second, other=0.0)[None, :] * (before2 - z2)
            to = before_ptr + b[:, None] * S + half[None, :]
            tl.store(to, z1.to(before_ptr.dtype.element_ty), mask=written & first[None, :])
            tl.store(to + H, z2.to(before_ptr.dtype.element_ty), mask=written & second[None, :])
        # Queries are arrays of their own, keys go to the window or the state.
        for number in tl.static_range(ROLES):
            own = (role == number)[:, None]
            y1 = (k1 if number % 2 else z1) * _only(gamma1_RH, own) + _only(beta1_RH, own)
            y2 = (k2 if number % 2 else z2) * _only(gamma2_RH, own) + _only(beta2_RH, own)
            if ROPE:
                y1, y2 = y1 * cos - y2 * sin, y2 * cos + y1 * sin
            if number % 2 == 0:
                ptr = q_ptr if number == 0 else q_lin_ptr if number == 2 else q_far_ptr
                to = ptr + b[:, None] * S + half[None, :]
                mask = (b < B)[:, None]
            else:
                ptr = k_ptr if number == 1 else k_lin_ptr if number == 3 else far_k_ptr
                to = ptr + (row if number < 4 else far_row)[:, None] * S + half[None, :]
                mask = written if number < 4 else far_written
            tl.store(to, y1.to(q_ptr.dtype.element_ty), mask=mask & first[None, :])
            tl.store(to + H, y2.to(q_ptr.dtype.element_ty), mask=mask & second[None, :])


@triton.jit
def decode_attention_kernel(
    q_ptr, q_lin_ptr, u_ptr, k_ptr, k_lin_ptr, v_ptr, sum_ptr, bias_ptr, place_ptr, scales_ptr, gate_ptr, count_ptr,
    o_ptr,
    C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr, NEAR: tl.constexpr,
    GATED: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """o = u (a v + q_lin sum): the token's row of attention, over its window and over what is summed up.

    In its own chunk, or NEAR chunks, a = weight_scale relu(q k score_scale + bias)^2; in the one before these
    a = state_scale q_lin k_lin.
    Both are rows of one tile, 0 where the other has a say; the matmuls' other rows are 0. (What a row reads is its own,
    so they multiply one row with a matrix; but the loads of matmuls are pipelined.)

    Grid    [E / BLOCK_E, B]
    Tile    [16, BLOCK_E], of which a row is 2, sums over BLOCK_W rows of S at a time, then over BLOCK_W places
    Reads   q and q_lin [B, S]; u [B, E]; of k, k_lin [B, PLACES, S] and v [B, PLACES, E] what is filled; sum [B, S, E];
            bias [2 NEAR C - 1], if BIAS; place [3, B], the token's and the first of the sequence; scales [3, B]:
            score_scale, weight_scale, state_scale, which is that of sum too; if GATED these two follow from gate
            [B, PLACES] and count [B]
    Writes  o [B, E]
    Bytes   393 KB of the sum, and up to 918 KB of the chunk for a row; keys for every tile of E, from the cache
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    r = tl.arange(0, 16)
    s = tl.arange(0, BLOCK_S)
    place = tl.load(place_ptr + b)
    score_scale = tl.load(scales_ptr + b)
    weight_scale = tl.load(scales_ptr + rows + b)
    state_scale = tl.load(scales_ptr + 2 * rows + b)
    sum_scale = state_scale
    zero = tl.load(place_ptr + rows + b)
    # The first chunk nearby: 1 where the one before it is in the window and not in the sum yet.
    chunk = place // C - (NEAR - 1)
    if GATED:
        far = tl.where(zero > 0, 0, chunk)
        state_scale, sum_scale = scales_in_window(gate_ptr + b * PLACES, count_ptr + b, far, C, MEAN, BLOCK_C)
    u = tl.load(u_ptr + b * E + e, mask=e < E, other=0.0).to(tl.float32)
    q_rows = tl.where(r == 0, q_ptr, q_lin_ptr) + b * S  # [16]
    queries = tl.load(q_rows[:, None] + s[None, :], mask=(r < 2)[:, None] & (s < S)[None, :], other=0.0)  # [16, BS]
    dtype = queries.dtype
    mixed = tl.zeros((16, BLOCK_E), tl.float32)
    for start in range(0, S, BLOCK_W):
        i = start + tl.arange(0, BLOCK_W)
        q_lin = tl.load(q_rows[:, None] + i[None, :], mask=(r == 1)[:, None] & (i < S)[None, :], other=0.0)  # [16, BW]
        m = load_tile(sum_ptr + b * S * E, i, e, E, S, E)  # [BW, BE]
        # [16, BW] @ [BW, BE]
        mixed = tl.dot((q_lin.to(tl.float32) * sum_scale).to(dtype), m, mixed, input_precision=PRECISION)
    for start in range(0, tl.minimum(place + 1, PLACES), BLOCK_W):
        j = start + tl.arange(0, BLOCK_W)
        own = j // C >= chunk
        mask = (j <= place) & (j < PLACES) & (j >= zero)
        row = (b * PLACES + j) * S
        keys_ptr = tl.where(own, k_ptr, k_lin_ptr) + row  # [BW]
        keys = tl.load(keys_ptr[:, None] + s[None, :], mask=mask[:, None] & (s < S)[None, :], other=0.0)  # [BW, BS]
        v = tl.load(
            v_ptr + (b * PLACES + j)[:, None] * E + e[None, :], mask=mask[:, None] & (e < E)[None, :], other=0.0
        )  # [BW, BE]
        # [16, BS] @ [BS, BW]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        near = scores * score_scale
        if BIAS:
            near += tl.load(bias_ptr + j - place + NEAR * C - 1, mask=mask & own, other=0.0).to(tl.float32)[None, :]
        near = tl.maximum(near, 0.0)
        a = tl.where(own[None, :], near * near * weight_scale, scores * state_scale)
        a = tl.where(mask[None, :] & (r[:, None] == tl.where(own, 0, 1)[None, :]), a, 0.0)
        # [16, BW] @ [BW, BE]
        mixed = tl.dot(a.to(dtype), v, mixed, input_precision=PRECISION)
    tl.store(o_ptr + b * E + e, (u * tl.sum(mixed, axis=0)).to(o_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def decode_output_kernel(
    o_ptr, w_ptr, bias_ptr, x_ptr, y_ptr,
    B: tl.constexpr, E: tl.constexpr, D: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x + o Wo + b; if FAR, o is the sum of two.

    Grid    [D / BLOCK_N, B / BLOCK_B]
    Tile    [BLOCK_B, BLOCK_N], sums in steps of BLOCK_K
    Reads   o [B, E], if FAR [2, B, E]; w [E, D], bias [D], x [B, D]
    Writes  y [B, D]
    Bytes   2.4 MB of weights
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    x = load_tile(x_ptr, b, n, D, B, D).to(tl.float32)  # [BB, BN]
    product = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, E, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, k, n, D, E, D)  # [BK, BN]
        o = load_tile(o_ptr, b, k, E, B, E)  # [BB, BK]
        if FAR:
            far = load_tile(o_ptr + B * E, b, k, E, B, E)  # [BB, BK]
            o = (o.to(tl.float32) + far.to(tl.float32)).to(o.dtype)
        # [BB, BK] @ [BK, BN]
        product = tl.dot(o, w, product, input_precision=PRECISION)
    bias = tl.load(bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    store_tile(y_ptr, x + product + bias[None, :], b, n, D, B, D)
