"""Triton kernels of one token that reads several far chunks (`gau.ops.far_decoding`): the attention, and its parts.

The chunks are chosen once for all tokens of a chunk: a token reads what is chosen, and the one that completes a chunk
chooses for the next, which no token reads in the same launch. Pointers of the parts are those of a row of the batch.

Bytes are of size base with four chunks of C = 128 in bfloat16.
"""

import triton
import triton.language as tl

from gau.ops.kernels.decode_chunks_triton import decode_attention_kernel


@triton.jit
def chosen_chunks(
    mean_ptr, index_ptr, next_ptr, place, start,
    C: tl.constexpr, S: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns how many chunks a token reads, which, [BLOCK_R], and their mean keys, float32 [BLOCK_R, BLOCK_S].

    Beyond the border that its window crosses it reads what `next` says.
    """
    s = tl.arange(0, BLOCK_S)
    slot = tl.arange(0, BLOCK_R)
    count = tl.minimum(tl.minimum(start // C, R), G)
    index = tl.load(tl.where(place // C >= NEAR, next_ptr, index_ptr) + slot, mask=slot < R, other=0)
    mask = (slot < count)[:, None] & (s < S)[None, :]
    return count, index, tl.load(mean_ptr + index[:, None] * S + s[None, :], mask=mask, other=0.0)


@triton.jit
def chosen_block(
    k_ptr, v_ptr, index, of_means, block, e,
    C: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns of a block of the chosen chunks: its places in its chunk, q mean of that, k [BW, BS] and v [BW, BE]."""
    blocks: tl.constexpr = (C + BLOCK_W - 1) // BLOCK_W
    s = tl.arange(0, BLOCK_S)
    own = tl.arange(0, BLOCK_R) == block // blocks
    chunk = tl.sum(tl.where(own, index, 0), axis=0)
    of_mean = tl.sum(tl.where(own, of_means, 0.0), axis=0)
    c = block % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    at = (chunk.to(tl.int64) * C + c)[:, None]
    k = tl.load(k_ptr + at * S + s[None, :], mask=(c < C)[:, None] & (s < S)[None, :], other=0.0)
    v = tl.load(v_ptr + at * E + e[None, :], mask=(c < C)[:, None] & (e < E)[None, :], other=0.0)
    return c, of_mean, k, v


@triton.jit
def far_values(
    q_ptr, k_ptr, v_ptr, mean_ptr, index_ptr, next_ptr, place, start, e,
    C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, NEAR: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Returns sum of w v / (1 + sum of w), w = exp((q k + q mean) / sqrt(S)), over the chunks that are read, [BLOCK_E].

    Tile    [16, BLOCK_E], of which a row is the first (`decode_chunks_triton`), sums over BLOCK_W places at a time
    Reads   q [S]; of k [G C, S], v [G C, E] and mean [G, S] what is chosen by index or next [R]; place in the window;
            start, the position
    Bytes   1.6 MB of values for a row; 131 KB of keys for every tile of E, from the cache
    """
    s = tl.arange(0, BLOCK_S)
    is_row = tl.arange(0, 16) == 0
    count, index, means = chosen_chunks(mean_ptr, index_ptr, next_ptr, place, start, C, S, NEAR, R, G, BLOCK_S, BLOCK_R)
    q = tl.load(q_ptr + s, mask=s < S, other=0.0)
    of_means = tl.sum(means * q.to(tl.float32)[None, :], axis=1)
    queries = tl.where(is_row[:, None], q[None, :], 0.0).to(q.dtype)  # [16, BS]
    # Over the largest of all terms, of which the 1 is one.
    top = tl.zeros((16,), tl.float32)
    total = tl.full((16,), 1.0, tl.float32)
    mixed = tl.zeros((16, BLOCK_E), tl.float32)
    blocks: tl.constexpr = (C + BLOCK_W - 1) // BLOCK_W
    for block in range(0, count * blocks):
        c, of_mean, k, v = chosen_block(k_ptr, v_ptr, index, of_means, block, e, C, S, E, BLOCK_W, BLOCK_S, BLOCK_R)
        # [16, BS] @ [BS, BW]
        x = (tl.dot(queries, tl.trans(k), input_precision=PRECISION) + of_mean) * S**-0.5
        x = tl.where((c < C)[None, :], x, -1e30)
        new_top = tl.maximum(top, tl.max(x, axis=1))
        a = tl.exp(x - new_top[:, None])
        before = tl.exp(top - new_top)
        total = total * before + tl.sum(a, axis=1)
        # [16, BW] @ [BW, BE]
        mixed = tl.dot(a.to(v.dtype), v, mixed * before[:, None], input_precision=PRECISION)
        top = new_top
    return tl.sum(tl.where(is_row[:, None], mixed / total[:, None], 0.0), axis=0)


@triton.jit
def add_query_and_choose(
    q_ptr, k_ptr, mean_ptr, query_ptr, next_ptr, start,
    C: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds a token's query to those of its chunk; of a token that completes it, writes what the next chunk reads.

    That is this chunk, and the others whose mean keys fit the mean query best, earlier ones first where they fit alike.

    Reads   q [S]; start, the position, below 0: there is no token; of one that completes a chunk its k, C rows of S,
            and the mean of each chunk before [S], float32
    Writes  query [S], and of such a token the chunk's mean [S], both float32, and next [R]
    Bytes   of a token that completes a chunk 33 KB of its keys, 512 B of every chunk before
    """
    s = tl.arange(0, BLOCK_S)
    slot = tl.arange(0, BLOCK_R)
    chunk = start // C
    # (Of no token -1, or whatever a remainder is there.)
    ends = (start % C == C - 1) & (start >= 0)
    query = tl.load(query_ptr + s, mask=s < S, other=0.0)
    query = tl.where(start % C > 0, query, 0.0) + tl.load(q_ptr + s, mask=s < S, other=0.0).to(tl.float32)
    tl.store(query_ptr + s, tl.where(ends, 0.0, query), mask=(s < S) & (s * 0 + start >= 0))
    if ends:
        total = tl.zeros((BLOCK_S,), tl.float32)
        for first in range(0, C, BLOCK_G):
            c = first + tl.arange(0, BLOCK_G)
            at = chunk.to(tl.int64) * C + c
            k = tl.load(k_ptr + at[:, None] * S + s[None, :], mask=(c < C)[:, None] & (s < S)[None, :], other=0.0)
            total += tl.sum(k.to(tl.float32), axis=0)
        tl.store(mean_ptr + chunk * S + s, total / C, mask=s < S)
        # (Of the sum of queries: to divide it by C would change no order.)
        best = tl.full((BLOCK_R,), float('-inf'), tl.float32)
        index = tl.zeros((BLOCK_R,), tl.int32)
        for first in range(0, chunk + 1, BLOCK_G):
            g = first + tl.arange(0, BLOCK_G)
            at = mean_ptr + g[:, None] * S + s[None, :]
            means = tl.load(at, mask=(g < chunk)[:, None] & (s < S)[None, :], other=0.0)  # [BG, BS]
            fit = tl.sum(means * query[None, :], axis=1)
            fit = tl.where(g < chunk, fit, tl.where(g == chunk, float('inf'), float('-inf')))
            # The best of both, one after the other, into places of their own.
            merged = best
            merged_index = index
            for place in range(0, R):
                old = tl.max(best, axis=0)
                new = tl.max(fit, axis=0)
                # Those so far are of earlier chunks, and come first where they fit alike. One of both is taken.
                old_slot = tl.where(old >= new, tl.min(tl.where(best == old, slot, BLOCK_R), axis=0), BLOCK_R)
                # (Fits that are no numbers say nothing, and must not lead out of the state.)
                new_index = tl.where(old >= new, -1, tl.min(tl.where(fit == new, g, chunk), axis=0))
                taken = tl.where(old >= new, tl.sum(tl.where(slot == old_slot, index, 0), axis=0), new_index)
                merged = tl.where(slot == place, tl.maximum(old, new), merged)
                merged_index = tl.where(slot == place, taken, merged_index)
                best = tl.where(slot == old_slot, float('-inf'), best)
                fit = tl.where(g == new_index, float('-inf'), fit)
            best = merged
            index = merged_index
        tl.store(next_ptr + slot, index, mask=slot < R)


@triton.jit
def decode_far_attention_kernel(
    q_ptr, q_lin_ptr, u_ptr, k_ptr, k_lin_ptr, v_ptr, sum_ptr, bias_ptr, place_ptr, scales_ptr, gate_ptr, count_ptr,
    q_far_ptr, far_k_ptr, far_v_ptr, index_ptr, old_mean_ptr, old_query_ptr, old_next_ptr,
    o_ptr, mean_ptr, query_ptr, next_ptr,
    C: tl.constexpr, S: tl.constexpr, E: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr, NEAR: tl.constexpr,
    GATED: tl.constexpr, MEAN: tl.constexpr, FAR: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    FAR_W: tl.constexpr, FAR_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What `decode_attention_kernel` does, and beside it a second o: u times what the token reads of far chunks.

    FAR is how many tokens the state keeps, G C. Programs of their own read far chunks, at the same time as the others.

    Grid    [E / BLOCK_E + E / FAR_E + 1, B], of which the last chooses
    Reads   what `decode_attention_kernel` does; place [3, B] with the position in the sequence; q_far [B, S]; of far_k
            [B, FAR, S], far_v [B, FAR, E] and mean [B, G, S] what is chosen by index or next [B, R]
    Writes  o [2, B, E]; mean, query [B, S] and next, which take over the buffers of `old_*`
    """
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    far_tiles: tl.constexpr = (E + FAR_E - 1) // FAR_E
    G: tl.constexpr = FAR // C
    b = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    place = tl.load(place_ptr + b)
    start = tl.load(place_ptr + 2 * rows + b)
    q_far_ptr += b * S
    far_k_ptr += b * FAR * S
    far_v_ptr += b * FAR * E
    mean_ptr += b * G * S
    index_ptr += b * R
    next_ptr += b * R
    if tl.program_id(0) < tiles:
        decode_attention_kernel(
            q_ptr, q_lin_ptr, u_ptr, k_ptr, k_lin_ptr, v_ptr, sum_ptr, bias_ptr, place_ptr, scales_ptr, gate_ptr,
            count_ptr, o_ptr, C, S, E, PLACES, BIAS, NEAR, GATED, MEAN, PRECISION, BLOCK_W, BLOCK_S, BLOCK_E, BLOCK_C
        )  # fmt: skip
    elif tl.program_id(0) < tiles + far_tiles:
        e = (tl.program_id(0) - tiles) * FAR_E + tl.arange(0, FAR_E)
        far = far_values(
            q_far_ptr, far_k_ptr, far_v_ptr, mean_ptr, index_ptr, next_ptr, place, start, e,
            C, S, E, NEAR, R, G, PRECISION, FAR_W, BLOCK_S, FAR_E, BLOCK_R
        )  # fmt: skip
        # A token that the state has no place for must not look like one that it has.
        far = tl.where(start < FAR, far, float('nan'))
        u = tl.load(u_ptr + b * E + e, mask=e < E, other=0.0).to(tl.float32)
        tl.store(o_ptr + (rows + b) * E + e, (u * far).to(o_ptr.dtype.element_ty), mask=e < E)
    else:
        start = tl.where((place < PLACES) & (start < FAR), start, -1)
        add_query_and_choose(
            q_far_ptr, far_k_ptr, mean_ptr, query_ptr + b * S, next_ptr, start, C, S, R, FAR_W, BLOCK_S, BLOCK_R
        )
