"""A Triton kernel of one token of one sequence in a FLASH layer: what `decode_chunks_triton` does in three kernels.

One row costs waiting more than reading. Three kernels are three launches, and each begins to read when the one before
it has ended. Here all programs run at the same time, ask for their part of all that is read (weights, window, sum)
before they compute anything, and wait for each other twice. The grid must fit on the GPU at once.
"""

import triton
import triton.language as tl

from gau.ops.kernels.decay_gate_triton import scales_in_window
from gau.ops.kernels.decode_far_triton import add_query_and_choose, chosen_block, chosen_chunks
from gau.ops.kernels.load_store import load_tile


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _arrive(arrivals_ptr, PROGRAMS: tl.constexpr):
    """Tells the other programs that this one has written what it had to."""
    if PROGRAMS > 1:
        tl.debug_barrier()
        tl.atomic_add(arrivals_ptr, 1, sem='release', scope='gpu')


@triton.jit
def _wait(arrivals_ptr, wanted, PROGRAMS: tl.constexpr):
    """Returns when so many have arrived, and what they wrote before can be read."""
    if PROGRAMS > 1:
        while tl.atomic_add(arrivals_ptr, 0, sem='acquire', scope='gpu') < wanted:
            pass
        tl.debug_barrier()


@triton.jit
def decode_row_kernel(
    x_ptr, g_ptr, uv_ptr, uv_bias_ptr, z_ptr, z_bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, out_ptr, out_bias_ptr,
    sum_ptr, bias_ptr, place_ptr, scales_ptr, mix_ptr, gate_w_ptr, gate_bias_ptr, count_ptr,
    far_index_ptr, old_v_ptr, old_k_ptr, old_k_lin_ptr, old_arrivals_ptr, old_before_ptr, old_gate_ptr,
    old_far_k_ptr, old_far_v_ptr, old_mean_ptr, old_query_ptr, old_next_ptr,
    y_ptr, v_ptr, k_ptr, k_lin_ptr, arrivals_ptr, before_ptr, gate_ptr,
    far_k_ptr, far_v_ptr, mean_ptr, query_ptr, next_ptr, u_ptr, q_ptr, o_ptr,
    D: tl.constexpr, E: tl.constexpr, S: tl.constexpr, C: tl.constexpr, PLACES: tl.constexpr, FAR: tl.constexpr,
    R: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, SHIFTED: tl.constexpr, NEAR: tl.constexpr,
    GATED: tl.constexpr, MEAN: tl.constexpr, EPSILON: tl.constexpr, PROGRAMS: tl.constexpr, FIRST_Z: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    FAR_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = x + (u * (a v + q_lin sum)) Wo + bo of one row (`decode_chunks`); if FAR, with R far chunks beside a v.

    FAR is how many tokens the state keeps, 0: not all of them.

    Grid    [PROGRAMS], enough for 2 E / BLOCK_N tiles of u and v, and from program FIRST_Z on (S / 2) / BLOCK_H tiles
            of z; for E / BLOCK_E tiles of o; for D / BLOCK_D tiles of y
    Reads   x [D]; g; uv [D, 2 E], z [D, S] and out [E, D] with biases, float32; gamma and beta [4, S], if FAR [6, S];
            cos and sin [S / 2]; sum [S, E]; bias [2 NEAR C - 1], if BIAS; place [3]; scales [3]: score_scale,
            weight_scale, state_scale, which is that of sum too; of v [PLACES, E], k and k_lin [PLACES, S] what is
            filled; if SHIFTED, mix [S] and before [S], z of the token before; if GATED, w [D], a bias, and gate
            [PLACES] and count, of which these two scales follow; if FAR, far_index [R], and of far_k [FAR, S], far_v
            [FAR, E] and mean [FAR / C, S] what is chosen
    Writes  y [D]; v, k, k_lin and gate at `place`, arrivals, before, far_k and far_v at the token's place in the
            sequence, mean, query [S] and next [R], all of which take over the buffers of `old_*`; for the other
            programs u [E], q [2, S], if FAR [3, S], and o [E]
    Bytes   7.5 MB of weights, 393 KB of the sum, up to 918 KB of the chunk; 1.7 MB of four far chunks of 128
    """
    program = tl.program_id(0)
    # The count only grows, so that nobody must set it back. While this program has not arrived, no second time is over.
    arrived = 0
    if PROGRAMS > 1:
        arrived = tl.load(arrivals_ptr, volatile=True) // (2 * PROGRAMS) * (2 * PROGRAMS)
    place = tl.load(place_ptr)
    filled = tl.minimum(place, PLACES)
    zero = tl.load(place_ptr + 1)
    # The token's place among all that are kept; beyond their end: nowhere.
    far_place = tl.where(place < PLACES, tl.load(place_ptr + 2), FAR)
    # The first chunk nearby.
    chunk = place // C - (NEAR - 1)
    s = tl.arange(0, BLOCK_S)
    e = program * BLOCK_E + tl.arange(0, BLOCK_E)
    n = program * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_I)
    # What later parts read is asked for first of all.
    m = load_tile(sum_ptr, s, e, E, S, E)  # [BS, BE]
    out = load_tile(out_ptr, i, n, D, E, D)  # [BI, BD]
    y = tl.load(x_ptr + n, mask=n < D, other=0.0).to(tl.float32)
    y += tl.load(out_bias_ptr + n, mask=n < D, other=0.0).to(tl.float32)

    d = tl.arange(0, BLOCK_K)
    if program * BLOCK_N < 2 * E:
        col = program * BLOCK_N + tl.arange(0, BLOCK_N)
        w = load_tile(uv_ptr, d, col, 2 * E, D, 2 * E)  # [BK, BN]
        bias = tl.load(uv_bias_ptr + col, mask=col < 2 * E, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        scale = tl.load(g_ptr) / tl.sqrt(tl.sum(x * x, axis=0) / D + EPSILON)
        uv = _silu(tl.sum(x[:, None] * w.to(tl.float32), axis=0) * scale + bias)
        tl.store(u_ptr + col, uv.to(u_ptr.dtype.element_ty), mask=col < E)
        is_v = (col >= E) & (col < 2 * E) & (col * 0 + place < PLACES)
        tl.store(v_ptr + place.to(tl.int64) * E + col - E, uv.to(v_ptr.dtype.element_ty), mask=is_v)
        if FAR > 0:
            is_v = (col >= E) & (col < 2 * E) & (col * 0 + far_place < FAR)
            tl.store(far_v_ptr + far_place.to(tl.int64) * E + col - E, uv.to(v_ptr.dtype.element_ty), mask=is_v)
    if program >= FIRST_Z:
        H: tl.constexpr = (S + 1) // 2
        half = (program - FIRST_Z) * BLOCK_H + tl.arange(0, BLOCK_H)
        first = half < H
        second = half < S - H
        w1 = load_tile(z_ptr, d, half, S, D, H)  # [BK, BH]
        w2 = load_tile(z_ptr + H, d, half, S, D, S - H)  # [BK, BH]
        # Of q, k, q_lin and k_lin, and of q and k of far chunks.
        bound: tl.constexpr = 6 if FAR > 0 else None
        role = tl.arange(0, 8 if FAR > 0 else 4)
        gamma1 = load_tile(gamma_ptr, role, half, S, bound, H)  # [4, BH], if FAR [8, BH]
        gamma2 = load_tile(gamma_ptr + H, role, half, S, bound, S - H)
        beta1 = load_tile(beta_ptr, role, half, S, bound, H)
        beta2 = load_tile(beta_ptr + H, role, half, S, bound, S - H)
        bias1 = tl.load(z_bias_ptr + half, mask=first, other=0.0).to(tl.float32)
        bias2 = tl.load(z_bias_ptr + H + half, mask=second, other=0.0).to(tl.float32)
        if ROPE:
            cos = tl.load(cos_ptr + half, mask=first, other=0.0)[None, :]
            sin = tl.load(sin_ptr + half, mask=first, other=0.0)[None, :]
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        scale = tl.load(g_ptr) / tl.sqrt(tl.sum(x * x, axis=0) / D + EPSILON)
        if GATED:
            w = tl.load(gate_w_ptr + d, mask=d < D, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
            logit = tl.sum(x * w, axis=0) * scale + tl.load(gate_bias_ptr)
            tl.store(gate_ptr + place, logit, mask=(program == FIRST_Z) & (place < PLACES))
        z1 = _silu(tl.sum(x[:, None] * w1.to(tl.float32), axis=0) * scale + bias1)
        z2 = _silu(tl.sum(x[:, None] * w2.to(tl.float32), axis=0) * scale + bias2)
        of1 = z1[None, :]
        of2 = z2[None, :]
        if SHIFTED:
            before1 = tl.load(before_ptr + half, mask=first, other=0.0).to(tl.float32)
            before2 = tl.load(before_ptr + H + half, mask=second, other=0.0).to(tl.float32)
            mix1 = tl.load(mix_ptr + half, mask=first, other=0.0)
            mix2 = tl.load(mix_ptr + H + half, mask=second, other=0.0)
            # Every column is one program's.
            is_key = (role % 2 == 1)[:, None]
            of1 = tl.where(is_key, (z1 + mix1 * (before1 - z1))[None, :], of1)
            of2 = tl.where(is_key, (z2 + mix2 * (before2 - z2))[None, :], of2)
            has_place = half * 0 + place < PLACES
            tl.store(before_ptr + half, z1.to(before_ptr.dtype.element_ty), mask=first & has_place)
            tl.store(before_ptr + H + half, z2.to(before_ptr.dtype.element_ty), mask=second & has_place)
        y1 = of1 * gamma1.to(tl.float32) + beta1.to(tl.float32)
        y2 = of2 * gamma2.to(tl.float32) + beta2.to(tl.float32)
        if ROPE:
            y1, y2 = y1 * cos - y2 * sin, y2 * cos + y1 * sin
        row = place.to(tl.int64) * S
        to_q = tl.where(role == 0, q_ptr, q_ptr + S)
        to_k = tl.where(role == 1, k_ptr + row, k_lin_ptr + row)
        written = (role % 2 == 0) | (role * 0 + place < PLACES)
        if FAR > 0:
            to_q = tl.where(role == 4, q_ptr + 2 * S, to_q)
            to_k = tl.where(role == 5, far_k_ptr + far_place.to(tl.int64) * S, to_k)
            written &= (role < 5) | ((role == 5) & (role * 0 + far_place < FAR))
        to = tl.where(role % 2 == 0, to_q, to_k)[:, None] + half[None, :]
        tl.store(to, y1.to(q_ptr.dtype.element_ty), mask=written[:, None] & first[None, :])
        tl.store(to + H, y2.to(q_ptr.dtype.element_ty), mask=written[:, None] & second[None, :])
    _arrive(arrivals_ptr, PROGRAMS)
    v = _values(v_ptr, 0, e, zero, filled, E, BLOCK_W)  # [BW, BE]
    keys = _keys(k_ptr, k_lin_ptr, 0, s, zero, filled, chunk, C, S, BLOCK_W)  # [BW, BS]
    score_scale = tl.load(scales_ptr)
    weight_scale = tl.load(scales_ptr + 1)
    state_scale = tl.load(scales_ptr + 2)
    sum_scale = state_scale
    if GATED:
        # (Of the chunk before: no logit of this token.)
        far = tl.where(zero > 0, 0, chunk)
        state_scale, sum_scale = scales_in_window(gate_ptr, count_ptr, far, C, MEAN, BLOCK_C)
    if FAR > 0:
        count, index, means = chosen_chunks(
            mean_ptr, far_index_ptr, next_ptr, place, far_place, C, S, NEAR, R, FAR // C, BLOCK_S, BLOCK_R
        )
    _wait(arrivals_ptr, arrived + PROGRAMS, PROGRAMS)

    dtype = m.dtype
    q = tl.load(q_ptr + s, mask=s < S, other=0.0).to(tl.float32)
    q_lin = tl.load(q_ptr + S + s, mask=s < S, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    mixed = tl.sum((q_lin * sum_scale).to(dtype).to(tl.float32)[:, None] * m.to(tl.float32), axis=0)
    # The token itself; a row that has no place for one says nothing.
    at = tl.minimum(place, PLACES - 1).to(tl.int64)
    own_v = tl.load(v_ptr + at * E + e, mask=e < E, other=0.0).to(tl.float32)
    own_k = tl.load(k_ptr + at * S + s, mask=s < S, other=0.0).to(tl.float32)
    own = tl.sum(q * own_k, axis=0) * score_scale
    if BIAS:
        own += tl.load(bias_ptr + NEAR * C - 1).to(tl.float32)
    own = tl.maximum(own, 0.0)
    mixed += (own * own * weight_scale).to(dtype).to(tl.float32) * own_v
    for start in tl.static_range(0, PLACES, BLOCK_W):
        if start < filled:
            j = start + tl.arange(0, BLOCK_W)
            if start > 0:
                v = _values(v_ptr, start, e, zero, filled, E, BLOCK_W)
                keys = _keys(k_ptr, k_lin_ptr, start, s, zero, filled, chunk, C, S, BLOCK_W)
            current = j // C >= chunk
            seen = (j < filled) & (j >= zero)
            reader = tl.where(current[:, None], q[None, :], q_lin[None, :])
            scores = tl.sum(reader * keys.to(tl.float32), axis=1)  # [BW]
            near = scores * score_scale
            if BIAS:
                near += tl.load(bias_ptr + j - place + NEAR * C - 1, mask=seen & current, other=0.0).to(tl.float32)
            near = tl.maximum(near, 0.0)
            a = tl.where(current, near * near * weight_scale, scores * state_scale)
            a = tl.where(seen, a, 0.0).to(dtype).to(tl.float32)
            mixed += tl.sum(a[:, None] * v.to(tl.float32), axis=0)
    if FAR > 0:
        far = _far_values(
            q_ptr + 2 * S, far_k_ptr, far_v_ptr, count, index, means, e, C, S, E, FAR_W, BLOCK_S, BLOCK_E, BLOCK_R
        )
        # A token that the state has no place for must not look like one that it has.
        mixed += tl.where(far_place < FAR, far, float('nan'))
    tl.store(o_ptr + e, (u * mixed).to(o_ptr.dtype.element_ty), mask=e < E)
    _arrive(arrivals_ptr, PROGRAMS)
    if FAR > 0:
        start = tl.where(far_place < FAR, far_place, -1)
        # The last one, which has no tile of o where there are fewer of these than programs.
        if program == PROGRAMS - 1:
            add_query_and_choose(
                q_ptr + 2 * S, far_k_ptr, mean_ptr, query_ptr, next_ptr, start, C, S, R, FAR_W, BLOCK_S, BLOCK_R
            )
    _wait(arrivals_ptr, arrived + 2 * PROGRAMS, PROGRAMS)

    o = tl.load(o_ptr + i, mask=i < E, other=0.0).to(tl.float32)
    y += tl.sum(o[:, None] * out.to(tl.float32), axis=0)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < D)


@triton.jit
def _values(v_ptr, start: tl.constexpr, e, zero, filled, E: tl.constexpr, BLOCK_W: tl.constexpr):
    """Returns v at BLOCK_W places from `start` on, [BLOCK_W, BLOCK_E]; 0 where nothing is filled."""
    j = start + tl.arange(0, BLOCK_W)
    mask = ((j < filled) & (j >= zero))[:, None] & (e < E)[None, :]
    return tl.load(v_ptr + j[:, None] * E + e[None, :], mask=mask, other=0.0)


@triton.jit
def _keys(
    k_ptr, k_lin_ptr, start: tl.constexpr, s, zero, filled, chunk, C: tl.constexpr, S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Returns k of the places from this chunk on and k_lin of those before it, [BLOCK_W, BLOCK_S]."""
    j = start + tl.arange(0, BLOCK_W)
    ptr = tl.where(j // C >= chunk, k_ptr, k_lin_ptr) + j * S  # [BW]
    mask = ((j < filled) & (j >= zero))[:, None] & (s < S)[None, :]
    return tl.load(ptr[:, None] + s[None, :], mask=mask, other=0.0)


@triton.jit
def _far_values(
    q_ptr, k_ptr, v_ptr, count, index, means, e, C: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns what `far_values` of `decode_far_triton` does, [BLOCK_E], without the matrix units."""
    s = tl.arange(0, BLOCK_S)
    q = tl.load(q_ptr + s, mask=s < S, other=0.0).to(tl.float32)
    of_means = tl.sum(means * q[None, :], axis=1)
    # Over the largest of all terms, of which the 1 is one.
    top = tl.zeros((1,), tl.float32)
    total = tl.full((1,), 1.0, tl.float32)
    mixed = tl.zeros((BLOCK_E,), tl.float32)
    blocks: tl.constexpr = (C + BLOCK_W - 1) // BLOCK_W
    for block in range(0, count * blocks):
        c, of_mean, k, v = chosen_block(k_ptr, v_ptr, index, of_means, block, e, C, S, E, BLOCK_W, BLOCK_S, BLOCK_R)
        x = (tl.sum(q[None, :] * k.to(tl.float32), axis=1) + of_mean) * S**-0.5
        x = tl.where(c < C, x, -1e30)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        a = tl.exp(x - new_top)
        before = tl.exp(top - new_top)
        total = total * before + tl.sum(a, axis=0)
        mixed = mixed * before + tl.sum(a.to(v.dtype).to(tl.float32)[:, None] * v.to(tl.float32), axis=0)
        top = new_top
    return mixed / total
