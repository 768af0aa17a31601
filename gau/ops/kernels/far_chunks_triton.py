"""Triton kernels of the attention to chosen earlier chunks (`gau.ops.kernels.far_chunks` says what it is).

    x = q.k * scale, -inf where the key is of another document      a = exp(x - log_sum)      o = a v

Chunk g reads the chunks index[g], the first count[g] of READ places; each is a pair, of the number g READ + place, with
weights [C, C] of its own. Pairs without a chunk are neither written nor read. What reads a chunk i are the pairs
order[starts[i]] to order[starts[i + 1] - 1] of its sequence, as many as there are: loops over them have their length
from memory, and add in the order of the pairs, so that gradients are the same in every run. Index, order and starts
count from the beginning of a sequence. Chunks are read where they lie: no copy of values is made for those who read
them. Which one the next step of a loop reads is loaded a step before: a load that waits for another one of the same
step would take a stage of the software pipeline.

Keys are k + mean(k of the chunk). Every size is a compile-time constant; what sticks out of an array is masked.

Bytes are of size base (E = 1,536, S = 128, C = 256) with 65,536 tokens in bfloat16 and READ = 4, every array counted
once: one of [N, E] has 201 MB, one of all pairs [C, C] 134 MB, q and k 17 MB each. Several chunks read the same one: in
sequences of 8,192 tokens, of 25 MB an array, most of that comes from the cache.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import in_bounds, load_tile, store_tile


@triton.jit
def _load_ids(ids_ptr, i, ROWS: tl.constexpr):
    return tl.load(ids_ptr + i, mask=in_bounds(i, ROWS), other=0)


@triton.jit
def _scores(q, k, query_ids, key_ids, scale, PRECISION: tl.constexpr):
    """Returns q.k * scale, -inf where documents hide the key, or where it is padding or no token at all."""
    # [BM, BS] @ [BS, BN]
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    # No query has the id -1.
    key_ids = tl.where(key_ids > 0, key_ids, -1)
    return tl.where(query_ids[:, None] == key_ids[None, :], x, -float('inf'))


@triton.jit
def _source(index_ptr, chunk, place, G: tl.constexpr, READ: tl.constexpr):
    """Returns which chunk of the batch a chunk reads at this place; behind the last place, at the last one."""
    return chunk // G * G + tl.load(index_ptr + chunk * READ + tl.minimum(place, READ - 1))


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, ids_ptr, index_ptr, count_ptr, a_ptr, log_sum_ptr,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, READ: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The weights a, and log_sum = log(1 + sum of exp(x)) over all keys that a query reads.

    A program goes through its keys twice: for the log of the sum, with a running maximum that begins with the logarithm
    of the 1, and for the weights. That is a twelfth of the matmul with values, each time.

    Grid    [C / BLOCK_M, B G]
    Tile    x [BLOCK_M, BLOCK_N], all of S at once
    Reads   q and k [B, G, C, S], ids [B, G, C], index [B, G, READ], count [B, G]
    Writes  a [B, G, READ, C, C] of the pairs that there are; log_sum [B, G, C], float32
    Bytes   168 MB a layer: q, k, a
    """
    ROWS: tl.constexpr = None if C % BLOCK_M == 0 else C
    COLS: tl.constexpr = None if C % BLOCK_N == 0 else C
    WIDTH: tl.constexpr = None if S == BLOCK_S else S
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    steps = tl.load(count_ptr + chunk) * blocks
    q = load_tile(q_ptr + chunk * C * S, i, s, S, ROWS, WIDTH)  # [BM, BS]
    query_ids = _load_ids(ids_ptr + chunk * C, i, ROWS)
    largest = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    source = _source(index_ptr, chunk, 0, G, READ)
    for step in range(0, steps):
        j = step % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + source * C * S, j, s, S, COLS, WIDTH)  # [BN, BS]
        x = _scores(q, k, query_ids, _load_ids(ids_ptr + source * C, j, COLS), SCALE, PRECISION)
        larger = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), 1)
        largest = larger
        source = _source(index_ptr, chunk, (step + 1) // blocks, G, READ)
    log_sum = largest + tl.log(total)
    tl.store(log_sum_ptr + chunk * C + i, log_sum, mask=in_bounds(i, ROWS))
    source = _source(index_ptr, chunk, 0, G, READ)
    for step in range(0, steps):
        j = step % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + source * C * S, j, s, S, COLS, WIDTH)  # [BN, BS]
        x = _scores(q, k, query_ids, _load_ids(ids_ptr + source * C, j, COLS), SCALE, PRECISION)
        pair = chunk * READ + step // blocks
        store_tile(a_ptr + pair * C * C, tl.exp(x - log_sum[:, None]), i, j, C, ROWS, COLS)
        source = _source(index_ptr, chunk, (step + 1) // blocks, G, READ)


@triton.jit
def sum_over_read_kernel(
    a_ptr, x_ptr, index_ptr, count_ptr, y_ptr,
    G: tl.constexpr, C: tl.constexpr, E: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = sum of a x over the chunks that a chunk reads, zeros where it reads none: o = a v, and dq = ds k.

    Grid    [C / BLOCK_M, E / BLOCK_E, B G]
    Tile    y [BLOCK_M, BLOCK_E], sums in steps of BLOCK_K
    Reads   a [B, G, READ, C, C], x [B, G, C, E], index [B, G, READ], count [B, G]
    Writes  y [B, G, C, E]
    Bytes   537 MB a layer: a, v, o; 168 MB: ds, k, dq
    """
    ROWS: tl.constexpr = None if C % BLOCK_M == 0 else C
    INNER: tl.constexpr = None if C % BLOCK_K == 0 else C
    COLS: tl.constexpr = None if E % BLOCK_E == 0 else E
    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    y = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    source = _source(index_ptr, chunk, 0, G, READ)
    for step in range(0, tl.load(count_ptr + chunk) * blocks):
        j = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        a = load_tile(a_ptr + (chunk * READ + step // blocks) * C * C, m, j, C, ROWS, INNER)  # [BM, BK]
        x = load_tile(x_ptr + source * C * E, j, e, E, INNER, COLS)  # [BK, BE]
        # [BM, BK] @ [BK, BE]
        y = tl.dot(a, x, y, input_precision=PRECISION)
        source = _source(index_ptr, chunk, (step + 1) // blocks, G, READ)
    store_tile(y_ptr + chunk * C * E, y, m, e, E, ROWS, COLS)


@triton.jit
def scores_gradient_kernel(
    q_ptr, k_ptr, ids_ptr, index_ptr, count_ptr, log_sum_ptr, v_ptr, do_ptr, a_ptr, part_ptr, sums_ptr,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, READ: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
    SIDE: tl.constexpr, INNER: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The weights a again, and of the gradient of q.k what a tile knows: part = a (da - mean) scale, da = do v^T.

    The gradient is a (da - delta) scale with delta, the sum of a da, over all keys that a query reads. In the place of
    delta stands the mean of da, weighted by a, in a row of the tile: what all da have in common is gone before anything
    is rounded, and the difference between this mean and delta is for the caller to add.

    Grid    [tiles of a pair, READ, B G]
    Tile    [SIDE, SIDE] of a and ds; sums over E in steps of INNER, all of S at once
    Reads   q and k [B, G, C, S], ids [B, G, C], index [B, G, READ], count [B, G]; log_sum [B, G, C], float32;
            v and do [B, G, C, E]
    Writes  of the pairs that there are: a and part [B, G, READ, C, C], and sums [B, G, READ, C / SIDE, 2, C], float32:
            those of a and of a da over a row of a tile
    Bytes   704 MB a layer: q, k, v, do; a, part
    """
    ROWS: tl.constexpr = None if C % SIDE == 0 else C
    COLS: tl.constexpr = None if E % INNER == 0 else E
    WIDTH: tl.constexpr = None if S == BLOCK_S else S
    across: tl.constexpr = (C + SIDE - 1) // SIDE
    i = tl.program_id(0) // across * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(0) % across * SIDE + tl.arange(0, SIDE)
    s = tl.arange(0, BLOCK_S)
    place = tl.program_id(1)
    chunk = tl.program_id(2).to(tl.int64)
    if place < tl.load(count_ptr + chunk):
        source = _source(index_ptr, chunk, place, G, READ)
        da = tl.zeros((SIDE, SIDE), tl.float32)
        for start in range(0, E, INNER):
            e = start + tl.arange(0, INNER)
            do = load_tile(do_ptr + chunk * C * E, i, e, E, ROWS, COLS)  # [SIDE, INNER]
            v = load_tile(v_ptr + source * C * E, j, e, E, ROWS, COLS)  # [SIDE, INNER]
            # [SIDE, INNER] @ [INNER, SIDE]
            da = tl.dot(do, tl.trans(v), da, input_precision=PRECISION)
        q = load_tile(q_ptr + chunk * C * S, i, s, S, ROWS, WIDTH)  # [SIDE, BS]
        k = load_tile(k_ptr + source * C * S, j, s, S, ROWS, WIDTH)  # [SIDE, BS]
        query_ids, key_ids = _load_ids(ids_ptr + chunk * C, i, ROWS), _load_ids(ids_ptr + source * C, j, ROWS)
        x = _scores(q, k, query_ids, key_ids, SCALE, PRECISION)
        log_sum = tl.load(log_sum_ptr + chunk * C + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
        a = tl.exp(x - log_sum)
        total, weighted = tl.sum(a, 1), tl.sum(a * da, 1)
        mean = weighted / tl.maximum(total, 1e-30)
        pair = chunk * READ + place
        store_tile(a_ptr + pair * C * C, a, i, j, C, ROWS, ROWS)
        store_tile(part_ptr + pair * C * C, a * (da - mean[:, None]) * SCALE, i, j, C, ROWS, ROWS)
        row_ptr = sums_ptr + (pair * across + tl.program_id(0) % across) * 2 * C + i
        tl.store(row_ptr, total, mask=in_bounds(i, ROWS))
        tl.store(row_ptr + C, weighted, mask=in_bounds(i, ROWS))


@triton.jit
def _pair(order_ptr, chunk, place, G: tl.constexpr, READ: tl.constexpr):
    """Returns the number in the batch of the pair at a place of `order`; behind the last place, at the last one."""
    first = chunk // G * G * READ
    return first + tl.load(order_ptr + first + tl.minimum(place, G * READ - 1))


@triton.jit
def sum_over_readers_kernel(
    a_ptr, x_ptr, order_ptr, starts_ptr, y_ptr,
    G: tl.constexpr, C: tl.constexpr, E: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = sum of a^T x over the pairs that read a chunk, zeros where none does: dv = a^T do, and dk = ds^T q.

    Grid    [C / BLOCK_M, E / BLOCK_E, B G]
    Tile    y [BLOCK_M, BLOCK_E], sums in steps of BLOCK_K
    Reads   a [B, G, READ, C, C], x [B, G, C, E], order [B, G READ], starts [B, G + 1]
    Writes  y [B, G, C, E]
    Bytes   537 MB a layer: a, do, dv; 168 MB: ds, q, dk
    """
    ROWS: tl.constexpr = None if C % BLOCK_M == 0 else C
    INNER: tl.constexpr = None if C % BLOCK_K == 0 else C
    COLS: tl.constexpr = None if E % BLOCK_E == 0 else E
    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    starts_ptr += chunk // G * (G + 1) + chunk % G
    begin, end = tl.load(starts_ptr), tl.load(starts_ptr + 1)
    y = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    pair = _pair(order_ptr, chunk, begin, G, READ)
    for step in range(begin * blocks, end * blocks):
        c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        a = load_tile(a_ptr + pair * C * C, c, m, C, INNER, ROWS)  # [BK, BM]
        x = load_tile(x_ptr + pair // READ * C * E, c, e, E, INNER, COLS)  # [BK, BE]
        # [BM, BK] @ [BK, BE]
        y = tl.dot(tl.trans(a), x, y, input_precision=PRECISION)
        pair = _pair(order_ptr, chunk, (step + 1) // blocks, G, READ)
    store_tile(y_ptr + chunk * C * E, y, m, e, E, ROWS, COLS)
