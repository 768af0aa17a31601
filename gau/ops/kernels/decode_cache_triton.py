"""Triton kernels of one token that looks back on keys and values of all tokens (`gau.ops.kernels.decode_cache`)."""

import triton
import triton.language as tl


@triton.jit
def decode_cache_kernel(
    q_ptr, new_k_ptr, new_v_ptr, bias_ptr, place_ptr, scales_ptr, old_k_ptr, old_v_ptr,
    o_ptr, top_ptr, total_ptr, k_ptr, v_ptr,
    M: tl.constexpr, S: tl.constexpr, E: tl.constexpr, H: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr,
    SPAN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A part of a query's row of attention, over SPAN of the places up to its own, which is filled first.

    With SOFTMAX o = sum of exp(x - top) v, total = sum of exp(x - top) for x = q k score_scale + bias, top the largest
    x; else o = sum of weight_scale relu(x)^2 v. The token itself is not read from where it is written: the program with
    its place begins with it.

    Grid    [M / SPAN, E / BLOCK_E, B H]: programs beyond the token's place read nothing
    Tile    [16, BLOCK_E], of which a row is the first (`decode_chunks_triton`), sums over BLOCK_M places at a time
    Reads   q and new_k [B H, S], new_v [B H, E], k [B H, M, S], v [B H, M, E], bias [B H, M] if BIAS; place [B], where
            the token stands; scales [2, B]: score_scale, weight_scale
    Writes  o [B H, M / SPAN, E], top and total [B H, M / SPAN], float32; of k and v, which take over the buffers of
            `old_*`, the token's place
    """
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(2) // H
    s = tl.arange(0, BLOCK_S)
    place = tl.load(place_ptr + row // H)
    score_scale = tl.load(scales_ptr + row // H)
    weight_scale = tl.load(scales_ptr + rows + row // H)
    is_row = tl.arange(0, 16) == 0
    q = tl.load(q_ptr + row * S + s, mask=s < S, other=0.0)
    new_k = tl.load(new_k_ptr + row * S + s, mask=s < S, other=0.0)
    new_v = tl.load(new_v_ptr + row * E + e, mask=e < E, other=0.0)
    first = tl.program_id(0) * SPAN
    mine = (place >= first) & (place < tl.minimum(first + SPAN, M))
    if mine:
        tl.store(v_ptr + (row * M + place) * E + e, new_v, mask=e < E)
        if tl.program_id(1) == 0:
            tl.store(k_ptr + (row * M + place) * S + s, new_k, mask=s < S)
    own_x = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=0) * score_scale
    if BIAS:
        own_x += tl.load(bias_ptr + row * M + tl.minimum(place, M - 1))
    # Lower than any score, and finite: a program without places has exp(top - top of all) = 0.
    top = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    own_a = own_x * 0 + 1
    if SOFTMAX:
        top = tl.where(is_row & mine, own_x, top)
        total = tl.where(is_row & mine, 1.0, total)
    else:
        own_x = tl.maximum(own_x, 0.0)
        own_a = (own_x * own_x * weight_scale).to(new_v.dtype).to(tl.float32)
    mixed = tl.where((is_row & mine)[:, None], own_a * new_v.to(tl.float32)[None, :], 0.0)  # [16, BE]
    queries = tl.where(is_row[:, None], q[None, :], 0.0).to(q.dtype)  # [16, BS]
    for start in range(first, tl.minimum(first + SPAN, tl.minimum(place, M)), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = m < place
        at = (row * M + m)[:, None]
        v = tl.load(v_ptr + at * E + e[None, :], mask=mask[:, None] & (e < E)[None, :], other=0.0)  # [BM, BE]
        k = tl.load(k_ptr + at * S + s[None, :], mask=mask[:, None] & (s < S)[None, :], other=0.0)  # [BM, BS]
        # [16, BS] @ [BS, BM]
        x = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * score_scale
        if BIAS:
            x += tl.load(bias_ptr + row * M + m, mask=mask, other=0.0)[None, :]
        if SOFTMAX:
            x = tl.where(mask[None, :], x, -1e30)
            new_top = tl.maximum(top, tl.max(x, axis=1))
            a = tl.where(mask[None, :], tl.exp(x - new_top[:, None]), 0.0)
            before = tl.exp(top - new_top)
            total = total * before + tl.sum(a, axis=1)
            mixed *= before[:, None]
            top = new_top
        else:
            x = tl.maximum(x, 0.0)
            a = tl.where(mask[None, :] & is_row[:, None], x * x * weight_scale, 0.0)
        # [16, BM] @ [BM, BE]
        mixed = tl.dot(a.to(v.dtype), v, mixed, input_precision=PRECISION)
    part = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(o_ptr + part * E + e, tl.sum(tl.where(is_row[:, None], mixed, 0.0), axis=0), mask=e < E)
    if tl.program_id(1) == 0:
        tl.store(top_ptr + part, tl.max(tl.where(is_row, top, -1e30), axis=0))
        tl.store(total_ptr + part, tl.sum(tl.where(is_row, total, 0.0), axis=0))


@triton.jit
def add_parts_kernel(
    o_ptr, top_ptr, total_ptr, y_ptr,
    PARTS: tl.constexpr, E: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The parts of each row added up: y = sum of o exp(top - the largest) / sum of total exp(...), or the sum of o.

    Grid    [E / BLOCK_E, B H]
    Tile    [BLOCK_X, BLOCK_E]
    Reads   o [B H, PARTS, E], top and total [B H, PARTS]
    Writes  y [B H, E]
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.program_id(1).to(tl.int64)
    y = tl.zeros((BLOCK_E,), tl.float32)
    top = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, PARTS, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        o = tl.load(
            o_ptr + (row * PARTS + x)[:, None] * E + e[None, :], mask=(x < PARTS)[:, None] & (e < E)[None, :], other=0.0
        )
        if SOFTMAX:
            tops = tl.load(top_ptr + row * PARTS + x, mask=x < PARTS, other=-1e30)
            totals = tl.load(total_ptr + row * PARTS + x, mask=x < PARTS, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, axis=0))
            share = tl.exp(tops - new_top)
            before = tl.exp(top - new_top)
            y = y * before + tl.sum(o * share[:, None], axis=0)
            total = total * before + tl.sum(totals * share, axis=0)
            top = new_top
        else:
            y += tl.sum(o, axis=0)
    if SOFTMAX:
        y /= total
    tl.store(y_ptr + row * E + e, y.to(y_ptr.dtype.element_ty), mask=e < E)
