"""Triton kernels of quadratic attention: from q.k to a block of weights, and back from their gradient.

    x = q.k * score_scale + bias, -inf where the key is hidden

    relu^2                  a = relu(x)^2 * normaliser       the normaliser is the query's weight_scale
    softmax (SOFTMAX)       a = exp(x - normaliser)          the normaliser is the log of its sum of exp(x)

The block [n, m] is all of the attention matrix [N, N] that exists at once. `firsts` are the places of its first query
and its first key among the N tokens, offset is their difference. `bias` has a number for each distance k - q from
-(N - 1) to N - 1. Sizes are compile-time constants; what sticks out of an array is masked.

Bytes are of size base (S = 128) with 65,536 tokens in bfloat16, causal, all blocks of a layer together: in sequences of
8,192 tokens a has 604 MB in groups of blocks (`gau.ops.kernels.quadratic`), in chunks of 256 it has 34 MB. Queries and
keys, 17 MB each, are read again for every tile, from the cache.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import in_bounds, load_tile, store_tile


@triton.jit
def _bias_and_mask(
    bias_ptr, offset, i, j,
    ROWS: tl.constexpr, COLS: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Returns what is added to scaled scores in every sequence: the bias, and -inf where no query may see the key."""
    distance = j[None, :] - i[:, None] - offset
    seen = in_bounds(i, ROWS)[:, None] & in_bounds(j, COLS)[None, :]
    shift = tl.zeros(distance.shape, tl.float32)
    if BIAS:
        shift = tl.load(bias_ptr + distance + N - 1, mask=seen, other=0.0)
    if CAUSAL:
        seen = seen & (distance <= 0)
    return tl.where(seen, shift, -float('inf'))


@triton.jit
def _scores(
    q, k, ids_ptr, scale, shift, i, j, query, key,
    ROWS: tl.constexpr, COLS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns q.k * scale + shift, -inf where documents hide the key; `ids_ptr` is that of the sequence."""
    # [BM, BS] @ [BS, BN]
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + shift
    if DOCUMENTS:
        query_ids = tl.load(ids_ptr + query + i, mask=in_bounds(i, ROWS), other=0)
        key_ids = tl.load(ids_ptr + key + j, mask=in_bounds(j, COLS), other=0)
        # No query has the id -1, so that one comparison hides padding as well.
        key_ids = tl.where(key_ids > 0, key_ids, -1)
        x = tl.where(query_ids[:, None] == key_ids[None, :], x, -float('inf'))
    return x


@triton.jit
def _load_keys(
    k_ptr, b, key, j, s, COLS: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr
):
    """Loads the keys at the places key + j among the N of sequence b; from one sequence to the next there are KEYS.

    With fewer than N, sequences overlap. Each then begins before its own keys, and of the first one, before which there
    is nothing, other keys are loaded there.
    """
    first = b * KEYS + key - (N - KEYS)
    if KEYS < N:
        j = tl.maximum(j, -first)
    return load_tile(k_ptr + first * S, j, s, S, COLS, WIDTH)


@triton.jit
def _relu(x):
    """The plain maximum of a NaN and 0 is 0: a layer whose queries are NaN would look like one that sees nothing."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tiles_seen(first_i, offset, m: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns how many tiles of keys, from the first on, the queries from `first_i` on may see."""
    seen = tl.cdiv(m, BLOCK_N)
    if CAUSAL:
        seen = tl.maximum(tl.minimum((first_i + BLOCK_M - 1 + offset) // BLOCK_N + 1, seen), 0)
    return seen


@triton.jit
def log_sums_kernel(
    q_ptr, k_ptr, bias_ptr, score_scale_ptr, unused_ptr, ids_ptr, firsts_ptr, log_sum_ptr,
    n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The log of the sum of exp(x) over a part of the keys, with a running maximum; -inf where the query sees none.

    Grid    [parts of the keys, n / BLOCK_M, B]
    Tile    x [BLOCK_M, BLOCK_N], all of S at once
    Reads   what `weights_kernel` reads, without a normaliser
    Writes  log_sum [parts, B, n], float32
    Bytes   q and k: little
    """
    ROWS: tl.constexpr = None if n % BLOCK_M == 0 else n
    COLS: tl.constexpr = None if m % BLOCK_N == 0 else m
    WIDTH: tl.constexpr = None if S == BLOCK_S else S
    part, parts, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    # If causal, the last queries see the most keys: they come first, so that none of them is waited for.
    first_i = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    i, j, s = first_i + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    query, key = tl.load(firsts_ptr), tl.load(firsts_ptr + 1)
    q = load_tile(q_ptr + (b * Q + query - (N - Q)) * S, i, s, S, ROWS, WIDTH)  # [BM, BS]
    scale = tl.load(score_scale_ptr + b * N + query + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
    largest = tl.full((BLOCK_M,), -float('inf'), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for number in range(part, _tiles_seen(first_i, query - key, m, CAUSAL, BLOCK_M, BLOCK_N), parts):
        keys = number * BLOCK_N + j
        shift = _bias_and_mask(bias_ptr, query - key, i, keys, ROWS, COLS, N, CAUSAL, BIAS)
        k = _load_keys(k_ptr, b, key, keys, s, COLS, WIDTH, S, N, KEYS)  # [BN, BS]
        x = _scores(q, k, ids_ptr + b * N, scale, shift, i, keys, query, key, ROWS, COLS, DOCUMENTS, PRECISION)
        larger = tl.maximum(largest, tl.max(x, 1))
        # Of a query that has seen no key so far, so that its sum is 0 and not NaN.
        reference = tl.where(larger == -float('inf'), 0.0, larger)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(x - reference[:, None]), 1)
        largest = larger
    batch = tl.num_programs(2)
    log_sum = largest + tl.log(tl.where(total == 0, 1.0, total))
    tl.store(log_sum_ptr + (part * batch + b) * n + i, log_sum, mask=in_bounds(i, ROWS))


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, bias_ptr, score_scale_ptr, normaliser_ptr, ids_ptr, firsts_ptr, a_ptr,
    n: tl.constexpr, m: tl.constexpr, S: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, KEYS: tl.constexpr,
    SOFTMAX: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The weights a.

    A program keeps its queries and goes through a part of the keys: to read both for every tile would take longer than
    to gather the bias again.

    Grid    [parts of the keys, n / BLOCK_M, B]
    Tile    a [BLOCK_M, BLOCK_N], all of S at once
    Reads   q [B, Q, S] of the last Q tokens, k [B, N, S], bias [2 N - 1] if BIAS, score_scale and normaliser [B, N],
            segment ids [B, N] if DOCUMENTS, firsts [2]
    Writes  a [B, n, m], zeros included
    Bytes   a once: 604 MB a layer, or 34 MB in chunks
    """
    ROWS: tl.constexpr = None if n % BLOCK_M == 0 else n
    COLS: tl.constexpr = None if m % BLOCK_N == 0 else m
    WIDTH: tl.constexpr = None if S == BLOCK_S else S
    part, parts, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    first_i = tl.program_id(1) * BLOCK_M
    i, j, s = first_i + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_S)
    query, key = tl.load(firsts_ptr), tl.load(firsts_ptr + 1)
    a_ptr += b * n * m
    q = load_tile(q_ptr + (b * Q + query - (N - Q)) * S, i, s, S, ROWS, WIDTH)  # [BM, BS]
    scale = tl.load(score_scale_ptr + b * N + query + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
    normaliser = tl.load(normaliser_ptr + b * N + query + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
    tiles, seen = tl.cdiv(m, BLOCK_N), _tiles_seen(first_i, query - key, m, CAUSAL, BLOCK_M, BLOCK_N)
    for number in range(part, seen, parts):
        keys = number * BLOCK_N + j
        shift = _bias_and_mask(bias_ptr, query - key, i, keys, ROWS, COLS, N, CAUSAL, BIAS)
        k = _load_keys(k_ptr, b, key, keys, s, COLS, WIDTH, S, N, KEYS)  # [BN, BS]
        x = _scores(q, k, ids_ptr + b * N, scale, shift, i, keys, query, key, ROWS, COLS, DOCUMENTS, PRECISION)
        if SOFTMAX:
            a = tl.exp(x - normaliser)
        else:
            r = _relu(x)
            a = r * (r * normaliser)
        store_tile(a_ptr, a, i, keys, m, ROWS, COLS)
    # From the first of its tiles that no query sees.
    hidden = part + tl.maximum(seen - part + parts - 1, 0) // parts * parts
    for number in range(hidden, tiles, parts):
        store_tile(a_ptr, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), i, number * BLOCK_N + j, m, ROWS, COLS)


@triton.jit
def weights_gradient_kernel(
    q_ptr, k_ptr, bias_ptr, score_scale_ptr, normaliser_ptr, ids_ptr, firsts_ptr, da_ptr, delta_ptr,
    a_ptr, ds_ptr, db_ptr,
    B: tl.constexpr, n: tl.constexpr, m: tl.constexpr,
    S: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, KEYS: tl.constexpr,
    SOFTMAX: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, DOCUMENTS: tl.constexpr,
    RECOMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """ds = dx score_scale, the gradient of q.k; db; and a.

    dx is da 2 relu(x) normaliser, and of softmax a (da - delta), delta being a query's mean of da weighted by a.
    A program has one tile and goes through a part of the batch, so that db stays in registers: the gradient of the
    bias, dx summed along the diagonals of the tile and over its part of the batch.

    Grid    [m / BLOCK_N, n / BLOCK_M, parts of the batch]
    Tile    ds [BLOCK_M, BLOCK_N], all of S at once; BLOCK_M is at most BLOCK_N
    Reads   what `weights_kernel` reads, da [B, n, m], and delta [B, N] if SOFTMAX
    Writes  ds [B, n, m]; a [B, n, m] if RECOMPUTE; db [parts, n / BLOCK_M, m / BLOCK_N, 2 BLOCK_N] if BIAS: sums for
            the distances j - i inside the tile, from -BLOCK_N on
    Bytes   as large as a: da, ds and, if RECOMPUTE, a: 1.8 GB a layer, or 67 MB in chunks, which do not recompute
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
    sequences = (B - part + parts - 1) // parts
    if CAUSAL and first_j > first_i + BLOCK_M - 1 + offset:
        for number in range(0, sequences):
            block, zeros = (part + number * parts) * n * m, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if RECOMPUTE:
                store_tile(a_ptr + block, zeros, i, j, m, ROWS, COLS)
            store_tile(ds_ptr + block, zeros, i, j, m, ROWS, COLS)
        # Done: Triton has no return in a branch.
        sequences = sequences * 0
    shift = _bias_and_mask(bias_ptr, offset, i, j, ROWS, COLS, N, CAUSAL, BIAS)
    # A factor that is left out of dx until sums are done.
    FACTOR: tl.constexpr = 1 if SOFTMAX else 2
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(0, sequences):
        b = part + number * parts
        block = b * n * m
        # Loaded before the matmul, which hides how long that takes.
        da = load_tile(da_ptr + block, i, j, m, ROWS, COLS)  # [BM, BN]
        scale = tl.load(score_scale_ptr + b * N + query + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
        q = load_tile(q_ptr + (b * Q + query - (N - Q)) * S, i, s, S, ROWS, WIDTH)  # [BM, BS]
        k = _load_keys(k_ptr, b, key, j, s, COLS, WIDTH, S, N, KEYS)  # [BN, BS]
        x = _scores(q, k, ids_ptr + b * N, scale, shift, i, j, query, key, ROWS, COLS, DOCUMENTS, PRECISION)
        normaliser = tl.load(normaliser_ptr + b * N + query + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
        if SOFTMAX:
            delta = tl.load(delta_ptr + b * N + query + i, mask=in_bounds(i, ROWS), other=0.0)[:, None]
            a = tl.exp(x - normaliser)
            dx = a * (da.to(tl.float32) - delta)
        else:
            r = _relu(x)
            scaled_r = normaliser * r
            a = r * scaled_r
            dx = da.to(tl.float32) * scaled_r
        if RECOMPUTE:
            store_tile(a_ptr + block, a, i, j, m, ROWS, COLS)
        store_tile(ds_ptr + block, dx * (FACTOR * scale), i, j, m, ROWS, COLS)
        if BIAS:
            db += dx
    if BIAS:
        # Row i is rotated to the left by i, so that diagonals stand in columns: first those from j = i on, then those
        # before it.
        column, row = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_M)[:, None]
        rotated = tl.gather(db, (column + row) % BLOCK_N, 1)
        wrapped = column + row >= BLOCK_N
        tiles = (part * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        db_ptr += tiles * 2 * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(db_ptr, FACTOR * tl.sum(tl.where(wrapped, rotated, 0.0), 0))
        tl.store(db_ptr + BLOCK_N, FACTOR * tl.sum(tl.where(wrapped, 0.0, rotated), 0))
