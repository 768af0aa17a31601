"""Triton kernels of one token in a FLASH layer (`gau.ops.kernels.decode_chunks` says what they compute together).

A token costs reading: every weight of the layer once, the window of the current chunk, and the sum of the chunks before
it. There are three kernels because each needs all of what the one before it writes. Rows of the batch are B in all; in
the matmuls they are the short side of a tile, of which 16 is the least.

Bytes are of size base (D = 768, E = 1,536, S = 128, C = 256) in bfloat16: those of the weights, and of a row's state.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _normalised_matmul(
    x_ptr, w_ptr, g_ptr, b, col, stride: tl.constexpr, COLS: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns x w g / rms(x), float32 [BLOCK_B, BLOCK_N]: ScaleNorm is one factor for a row, taken after the matmul."""
    product = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        w = load_tile(w_ptr, d, col, stride, D, COLS)  # [BK, BN]
        x = load_tile(x_ptr, b, d, D, B, D)  # [BB, BK]
        x32 = x.to(tl.float32)
        squares += tl.sum(x32 * x32, axis=1)
        # [BB, BK] @ [BK, BN]
        product = tl.dot(x.to(w.dtype), w, product, input_precision=PRECISION)
    return product * (tl.load(g_ptr) / tl.sqrt(squares / D + EPSILON))[:, None]


@triton.jit
def decode_projections_kernel(
    x_ptr, g_ptr, uv_ptr, uv_bias_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, place_ptr,
    old_v_ptr, old_k_ptr, old_k_lin_ptr,
    u_ptr, q_ptr, q_lin_ptr, v_ptr, k_ptr, k_lin_ptr,
    B: tl.constexpr, D: tl.constexpr, E: tl.constexpr, S: tl.constexpr, PLACES: tl.constexpr, ROPE: tl.constexpr,
    EPSILON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """[u, v] = silu(h Wuv + b) and z = silu(h Wz + b) for h = ScaleNorm(x); q, k, q_lin, k_lin = rope(z gamma + beta).

    Grid    [2 E / BLOCK_N + (S / 2) / BLOCK_H, B / BLOCK_B]: tiles of u and v, then of z
    Tile    [BLOCK_B, BLOCK_N]; of z two of [BLOCK_B, BLOCK_H], columns that the rotation pairs
    Reads   x [B, D]; g; uv [D, 2 E] and z [D, S] with biases, float32; gamma and beta [4, S]; cos and sin [B, S / 2];
            place [B], where in the window the token stands
    Writes  u [B, E], q and q_lin [B, S]; v [B, PLACES, E], k and k_lin [B, PLACES, S] at `place`, which take over the
            buffers of `old_*`
    Bytes   4.9 MB of weights
    """
    H: tl.constexpr = (S + 1) // 2
    tiles: tl.constexpr = (2 * E + BLOCK_N - 1) // BLOCK_N
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    place = tl.load(place_ptr + b, mask=b < B, other=PLACES)
    written = ((b < B) & (place < PLACES))[:, None]
    row = b.to(tl.int64) * PLACES + place
    if tl.program_id(0) < tiles:
        col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        uv = _normalised_matmul(
            x_ptr, uv_ptr, g_ptr, b, col, 2 * E, 2 * E, B, D, EPSILON, PRECISION, BLOCK_B, BLOCK_K, BLOCK_N
        )
        uv = _silu(uv + tl.load(uv_bias_ptr + col, mask=col < 2 * E, other=0.0).to(tl.float32)[None, :])
        store_tile(u_ptr, uv, b, col, E, B, E)
        is_v = (col >= E) & (col < 2 * E)
        v_at = v_ptr + row[:, None] * E + (col - E)[None, :]
        tl.store(v_at, uv.to(v_ptr.dtype.element_ty), mask=written & is_v[None, :])
    else:
        half = (tl.program_id(0) - tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        z1 = _normalised_matmul(x_ptr, z_ptr, g_ptr, b, half, S, H, B, D, EPSILON, PRECISION, BLOCK_B, BLOCK_K, BLOCK_H)
        z2 = _normalised_matmul(
            x_ptr, z_ptr + H, g_ptr, b, half, S, S - H, B, D, EPSILON, PRECISION, BLOCK_B, BLOCK_K, BLOCK_H
        )
        first = half < H
        second = half < S - H
        z1 = _silu(z1 + tl.load(z_bias_ptr + half, mask=first, other=0.0).to(tl.float32)[None, :])
        z2 = _silu(z2 + tl.load(z_bias_ptr + H + half, mask=second, other=0.0).to(tl.float32)[None, :])
        if ROPE:
            cos = load_tile(cos_ptr, b, half, H, B, H)  # [BB, BH]
            sin = load_tile(sin_ptr, b, half, H, B, H)
        # q, k, q_lin, k_lin: queries are arrays of their own, keys go to the window.
        for role in tl.static_range(4):
            gamma1 = tl.load(gamma_ptr + role * S + half, mask=first, other=0.0).to(tl.float32)[None, :]
            gamma2 = tl.load(gamma_ptr + role * S + H + half, mask=second, other=0.0).to(tl.float32)[None, :]
            beta1 = tl.load(beta_ptr + role * S + half, mask=first, other=0.0).to(tl.float32)[None, :]
            beta2 = tl.load(beta_ptr + role * S + H + half, mask=second, other=0.0).to(tl.float32)[None, :]
            y1 = z1 * gamma1 + beta1
            y2 = z2 * gamma2 + beta2
            if ROPE:
                y1, y2 = y1 * cos - y2 * sin, y2 * cos + y1 * sin
            if role % 2 == 0:
                ptr = q_ptr if role == 0 else q_lin_ptr
                to = ptr + b[:, None] * S + half[None, :]
                mask = (b < B)[:, None]
            else:
                ptr = k_ptr if role == 1 else k_lin_ptr
                to = ptr + row[:, None] * S + half[None, :]
                mask = written
            tl.store(to, y1.to(q_ptr.dtype.element_ty), mask=mask & first[None, :])
            tl.store(to + H, y2.to(q_ptr.dtype.element_ty), mask=mask & second[None, :])


@triton.jit
def decode_attention_kernel(
    q_ptr, q_lin_ptr, u_ptr, k_ptr, k_lin_ptr, v_ptr, sum_ptr, bias_ptr, place_ptr, scales_ptr, o_ptr,
    C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = u (a v + q_lin sum): the token's row of attention, over its window and over what is summed up.

    In its own chunk a = weight_scale relu(q k score_scale + bias)^2, in the one before a = state_scale q_lin k_lin.

    Grid    [E / BLOCK_E, B]
    Tile    [BLOCK_E] of a row, sums over BLOCK_W places of the window at a time, then over S
    Reads   q and q_lin [B, S]; u [B, E]; of k, k_lin [B, PLACES, S] and v [B, PLACES, E] what is filled; sum [B, S, E];
            bias [2 C - 1], if BIAS; place [B]; scales [4, B]: score_scale, weight_scale, state_scale, and that of sum
    Writes  o [B, E]
    Bytes   393 KB of the sum, and up to 918 KB of the chunk for a row; keys for every tile of E, from the cache
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)
    place = tl.load(place_ptr + b)
    score_scale = tl.load(scales_ptr + b)
    weight_scale = tl.load(scales_ptr + rows + b)
    state_scale = tl.load(scales_ptr + 2 * rows + b)
    sum_scale = tl.load(scales_ptr + 3 * rows + b)
    q = tl.load(q_ptr + b * S + s, mask=s < S, other=0.0).to(tl.float32)
    q_lin = tl.load(q_lin_ptr + b * S + s, mask=s < S, other=0.0).to(tl.float32)
    m = load_tile(sum_ptr + b * S * E, s, e, E, S, E)  # [BS, BE]
    dtype = m.dtype
    mixed = tl.sum((q_lin * sum_scale).to(dtype).to(tl.float32)[:, None] * m.to(tl.float32), axis=0)
    chunk = place // C
    for start in range(0, tl.minimum(place + 1, PLACES), BLOCK_W):
        j = start + tl.arange(0, BLOCK_W)
        own = j // C == chunk
        mask = (j <= place) & (j < PLACES)
        v = tl.load(
            v_ptr + (b * PLACES + j)[:, None] * E + e[None, :], mask=mask[:, None] & (e < E)[None, :], other=0.0
        )
        keys_ptr = tl.where(own, k_ptr, k_lin_ptr)  # [BW]
        where_key = (b * PLACES + j) * S
        keys = tl.load((keys_ptr + where_key)[:, None] + s[None, :], mask=mask[:, None] & (s < S)[None, :], other=0.0)
        reader = tl.where(own[:, None], q[None, :], q_lin[None, :])
        scores = tl.sum(reader * keys.to(tl.float32), axis=1)  # [BW]
        near = scores * score_scale
        if BIAS:
            near += tl.load(bias_ptr + j - place + C - 1, mask=mask & own, other=0.0).to(tl.float32)
        near = tl.maximum(near, 0.0)
        a = tl.where(own, near * near * weight_scale, scores * state_scale)
        a = tl.where(mask, a, 0.0).to(dtype).to(tl.float32)
        mixed += tl.sum(a[:, None] * v.to(tl.float32), axis=0)
    u = tl.load(u_ptr + b * E + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(o_ptr + b * E + e, (u * mixed).to(o_ptr.dtype.element_ty), mask=e < E)


@triton.jit
def decode_output_kernel(
    o_ptr, w_ptr, bias_ptr, x_ptr, y_ptr,
    B: tl.constexpr, E: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x + o Wo + b.

    Grid    [D / BLOCK_N, B / BLOCK_B]
    Tile    [BLOCK_B, BLOCK_N], sums in steps of BLOCK_K
    Reads   o [B, E], w [E, D], bias [D], x [B, D]
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
        # [BB, BK] @ [BK, BN]
        product = tl.dot(o, w, product, input_precision=PRECISION)
    bias = tl.load(bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    store_tile(y_ptr, x + product + bias[None, :], b, n, D, B, D)
