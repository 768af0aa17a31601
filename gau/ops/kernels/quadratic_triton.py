"""Triton kernels of quadratic attention with relu^2: from q.k to a block of weights, and back from their gradient.

The block [n, m] of the attention matrix is all of it that exists; `firsts` are the places of its first query and its
first key among the N tokens, offset is their difference. w holds the bias of all distances k - q from -(N - 1) to
N - 1. Sizes are compile-time constants; tiles that stick out are masked.
"""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile, within


@triton.jit
def _shift(
    w_ptr, offset, i, j,
    ROWS: tl.constexpr, COLS: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Returns what is added to the scores of all texts: the bias, and -inf where none lets the query see the key."""
    distance = j[None, :] - i[:, None] - offset
    seen = within(i, ROWS)[:, None] & within(j, COLS)[None, :]
    shift = tl.zeros(distance.shape, tl.float32)
    if BIAS:
        shift = tl.load(w_ptr + distance + N - 1, mask=seen, other=0.0)
    if CAUSAL:
        seen = seen & (distance <= 0)
    return tl.where(seen, shift, -float('inf'))


@triton.jit
def _roots(
    q, k, ids_ptr, scale, shift, i, j, query, key,
    ROWS: tl.constexpr, COLS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns relu(q.k * scale + shift), 0 where the document hides the key; `ids_ptr` is that of the text."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + shift
    # The plain maximum of a NaN and 0 is 0: a layer whose queries are NaN would be one that sees nothing.
    r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if DOCUMENTS:
        query_ids = tl.load(ids_ptr + query + i, mask=within(i, ROWS), other=0)
        key_ids = tl.load(ids_ptr + key + j, mask=within(j, COLS), other=0)
        # Padding is a document that no query is of, so that one comparison is enough.
        key_ids = tl.where(key_ids > 0, key_ids, -1)
        r = tl.where(query_ids[:, None] == key_ids[None, :], r, 0.0)
    return r


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, w_ptr, scale_ptr, after_ptr, ids_ptr, firsts_ptr, a_ptr,
    n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """a = relu(q.k * scale + w)^2 * after, grid [parts, n, B].

    A program keeps its queries and goes through a part of the keys: reading both for every tile takes longer than to
    gather the bias again.
    """
    ROWS: tl.constexpr = None if n % BLOCK_M == 0 else n
    COLS: tl.constexpr = None if m % BLOCK_N == 0 else m
    WIDTH: tl.constexpr = None if S == BLOCK_S else S
    part, parts, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    first_i = tl.program_id(1) * BLOCK_M
    i, j, s = first_i + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    query, key = tl.load(firsts_ptr), tl.load(firsts_ptr + 1)
    a_ptr += b * n * m
    q = tile(q_ptr + (b * N + query) * S, i, s, S, ROWS, WIDTH)
    scale = tl.load(scale_ptr + b * N + query + i, mask=within(i, ROWS), other=0.0)[:, None]
    after = tl.load(after_ptr + b * N + query + i, mask=within(i, ROWS), other=0.0)[:, None]
    tiles = (m + BLOCK_N - 1) // BLOCK_N
    seen = tiles
    if CAUSAL:
        seen = tl.maximum(tl.minimum((first_i + BLOCK_M - 1 + query - key) // BLOCK_N + 1, tiles), 0)
    for number in range(part, seen, parts):
        keys = number * BLOCK_N + j
        shift = _shift(w_ptr, query - key, i, keys, ROWS, COLS, N, CAUSAL, BIAS)
        k = tile(k_ptr + (b * N + key) * S, keys, s, S, COLS, WIDTH)
        r = _roots(q, k, ids_ptr + b * N, scale, shift, i, keys, query, key, ROWS, COLS, DOCUMENTS, PRECISION)
        put(a_ptr, r * (r * after), i, keys, m, ROWS, COLS)
    # The first of its tiles that no query sees.
    hidden = part + tl.maximum(seen - part + parts - 1, 0) // parts * parts
    for number in range(hidden, tiles, parts):
        put(a_ptr, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), i, number * BLOCK_N + j, m, ROWS, COLS)


@triton.jit
def weights_gradient_kernel(
    q_ptr, k_ptr, w_ptr, scale_ptr, after_ptr, ids_ptr, firsts_ptr, da_ptr, a_ptr, ds_ptr, db_ptr,
    B: tl.constexpr, n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, AGAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """ds = gradient of q.k, db = that of the bias along the diagonals of the tile, and a once more if AGAIN.

    Grid [m, n, parts]. A program has one tile and goes through a part of the batch, so that db stays in registers.
    db[part, n tile, m tile] has 2 BLOCK_N sums over a part of the batch, of the distances j - i inside the tile from
    -BLOCK_N; BLOCK_M is at most BLOCK_N.
    """
    tl.static_assert(BLOCK_M <= BLOCK_N)
    ROWS: tl.constexpr = None if n % BLOCK_M == 0 else n
    COLS: tl.constexpr = None if m % BLOCK_N == 0 else m
    WIDTH: tl.constexpr = None if S == BLOCK_S else S
    first_i, first_j = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    i, j, s = first_i + tl.arange(0, BLOCK_M), first_j + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    part, parts = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    query, key = tl.load(firsts_ptr), tl.load(firsts_ptr + 1)
    offset = query - key
    texts = (B - part + parts - 1) // parts
    if CAUSAL and first_j > first_i + BLOCK_M - 1 + offset:
        for number in range(0, texts):
            block, zeros = (part + number * parts) * n * m, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if AGAIN:
                put(a_ptr + block, zeros, i, j, m, ROWS, COLS)
            put(ds_ptr + block, zeros, i, j, m, ROWS, COLS)
        # That was all: Triton has no return in a branch.
        texts = texts * 0
    shift = _shift(w_ptr, offset, i, j, ROWS, COLS, N, CAUSAL, BIAS)
    half_db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(0, texts):
        b = part + number * parts
        block = b * n * m
        # Before the product, which hides how long it takes.
        da = tile(da_ptr + block, i, j, m, ROWS, COLS)
        scale = tl.load(scale_ptr + b * N + query + i, mask=within(i, ROWS), other=0.0)[:, None]
        q = tile(q_ptr + (b * N + query) * S, i, s, S, ROWS, WIDTH)
        k = tile(k_ptr + (b * N + key) * S, j, s, S, COLS, WIDTH)
        r = _roots(q, k, ids_ptr + b * N, scale, shift, i, j, query, key, ROWS, COLS, DOCUMENTS, PRECISION)
        after_r = tl.load(after_ptr + b * N + query + i, mask=within(i, ROWS), other=0.0)[:, None] * r
        half_slope = da.to(tl.float32) * after_r
        if AGAIN:
            put(a_ptr + block, r * after_r, i, j, m, ROWS, COLS)
        put(ds_ptr + block, half_slope * (2 * scale), i, j, m, ROWS, COLS)
        if BIAS:
            half_db += half_slope
    if BIAS:
        # Row by row turned to the left, so that diagonals stand in columns: those from j = i on, then those before.
        column, row = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_M)[:, None]
        turned = tl.gather(half_db, (column + row) % BLOCK_N, 1)
        wrapped = column + row >= BLOCK_N
        tiles = (part * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        db_ptr += tiles * 2 * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(db_ptr, 2 * tl.sum(tl.where(wrapped, turned, 0.0), 0))
        tl.store(db_ptr + BLOCK_N, 2 * tl.sum(tl.where(wrapped, 0.0, turned), 0))
