"""Triton kernels of the gated chunk product (`gau.ops.gated_chunks` says what it is, and has the same steps in JAX).

What they are for: U, V and what is made of them are [N, E], an order larger than anything else in the layer, and
reading and writing them is most of what a layer costs beside its matrix products. A kernel reads the projections as the
matrix product left them, adds the bias, applies silu where it needs u or v, and writes only what must outlive it.

Letters beside the house's: T = B G chunks of a batch; F = width of the linear queries and keys (S for one direction of
the states, 2 S for two); P parts of a sequence, each with a walk over its chunks that starts from nothing. Every size
is a compile-time constant; tiles that stick out of an array are masked.

The gradient of the gate needs a v + q m, which is o / silu(u) and so not kept.
"""

import triton
import triton.language as tl

from gau.ops.kernels.tiles import put, tile


@triton.jit
def _sigmoid(x):
    # A reciprocal root, squared, is three instructions; a division takes six.
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _silu(x):
    return x * _sigmoid(x)


@triton.jit
def _for_gate(u):
    """u, where silu(u) is no less than 1e-25: o / silu(u) must exist. It changes o by less than 1e-20 (a v + q m)."""
    u = tl.where(tl.abs(u) < 1e-20, 1e-20, u)
    return tl.where(u < -60, -60.0, u)


@triton.jit
def _bias(ptr, col, cols: tl.constexpr):
    return tl.load(ptr + col, mask=col < cols, other=0.0).to(tl.float32)


@triton.jit
def states_kernel(
    uv_ptr,
    bias_ptr,
    k_ptr,
    keep_ptr,
    m_ptr,
    totals_ptr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """m[g] = sum of k silu(v)^T over the chunks before g (after g, for the second direction), grid [E, P, B D].

    One program walks over the chunks of its part with the state [S, BLOCK_E] in registers. Every part starts from zero;
    where there are several, the state at the end of each is a total, for the caller to carry on to the others.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    batch = tl.program_id(2) // (F // S)
    direction = tl.program_id(2) % (F // S)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    bias_v = _bias(bias_ptr + E, e, E)
    length: tl.constexpr = (G + P - 1) // P
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ends = ((batch * P + part).to(tl.int64) * F + direction * S) * E
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    first = part * length
    for i in range(0, (tl.minimum(first + length, G) - first) * blocks):
        step = first + i // blocks
        g = tl.where(direction == 0, step, G - 1 - step)
        chunk = (batch * G + g).to(tl.int64)
        row = (i % blocks) * BLOCK_C + c
        if i % blocks == 0:
            put(m_ptr + (chunk * F + direction * S) * E, state, s, e, E, S, E)
            state *= tl.load(keep_ptr + chunk * (F // S) + direction)
        v = tile(uv_ptr + chunk * C * 2 * E + E, row, e, 2 * E, C, E).to(tl.float32)
        k = tile(k_ptr + chunk * C * F + direction * S, row, s, F, C, S)
        state = tl.dot(tl.trans(k), _silu(v + bias_v).to(k.dtype), state, input_precision=PRECISION)
    if P > 1:
        put(totals_ptr + ends, state, s, e, E, S, E)


@triton.jit
def output_kernel(
    uv_ptr,
    bias_ptr,
    a_ptr,
    q_ptr,
    m_ptr,
    o_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """o = silu(u) (a silu(v) + q m), one tile a program, grid [C, E, T]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    uv_ptr += chunk * C * 2 * E
    bias_v = _bias(bias_ptr + E, e, E)
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    end = C
    if CAUSAL:
        end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, C)
    for start in range(0, end, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        a = tile(a_ptr + chunk * C * C, m, c, C, C, C)
        v = tile(uv_ptr + E, c, e, 2 * E, C, E).to(tl.float32)
        mixed = tl.dot(a, _silu(v + bias_v).to(a.dtype), mixed, input_precision=PRECISION)
    for start in range(0, F, BLOCK_K):
        f = start + tl.arange(0, BLOCK_K)
        q = tile(q_ptr + chunk * C * F, m, f, F, C, F)
        state = tile(m_ptr + chunk * F * E, f, e, E, F, E)
        mixed = tl.dot(q, state, mixed, input_precision=PRECISION)
    u = tile(uv_ptr, m, e, 2 * E, C, E).to(tl.float32) + _bias(bias_ptr, e, E)
    put(o_ptr + chunk * C * E, mixed * _silu(_for_gate(u)), m, e, E, C, E)


@triton.jit
def gate_gradient_kernel(
    uv_ptr,
    bias_ptr,
    do_ptr,
    o_ptr,
    q_ptr,
    keep_ptr,
    duv_ptr,
    dmixed_ptr,
    dbias_ptr,
    dkv_ptr,
    totals_ptr,
    G: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dmixed = do silu(u), du, and dkv[g] = sum of q dmixed^T over the chunks that see g, grid [E, P, B D].

    The mirror of `states_kernel`: it walks against the states' direction. dkv[g] is the gradient of what chunk g adds
    to a state.
    """
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(1)
    batch = tl.program_id(2) // (F // S)
    direction = tl.program_id(2) % (F // S)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    bias_u = _bias(bias_ptr, e, E)
    length: tl.constexpr = (G + P - 1) // P
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ends = ((batch * P + part).to(tl.int64) * F + direction * S) * E
    state = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    dbias = tl.zeros((BLOCK_E,), tl.float32)
    first = part * length
    count = tl.minimum(first + length, G) - first
    for i in range(0, count * blocks):
        step = first + count - 1 - i // blocks
        g = tl.where(direction == 0, step, G - 1 - step)
        chunk = (batch * G + g).to(tl.int64)
        row = (i % blocks) * BLOCK_C + c
        if i % blocks == 0:
            put(dkv_ptr + (chunk * F + direction * S) * E, state, s, e, E, S, E)
            state *= tl.load(keep_ptr + chunk * (F // S) + direction)
        u = _for_gate(tile(uv_ptr + chunk * C * 2 * E, row, e, 2 * E, C, E).to(tl.float32) + bias_u)
        sigmoid = _sigmoid(u)
        do = tile(do_ptr + chunk * C * E, row, e, E, C, E).to(tl.float32)
        q = tile(q_ptr + chunk * C * F + direction * S, row, s, F, C, S)
        dmixed = (do * u * sigmoid).to(q.dtype)
        if direction == 0:
            o = tile(o_ptr + chunk * C * E, row, e, E, C, E).to(tl.float32)
            # silu'(u) / silu(u) = (1 + u (1 - sigmoid(u))) / u.
            du = do * (o / u) * (1 + u * (1 - sigmoid))
            dbias += tl.sum(du, axis=0)
            put(duv_ptr + chunk * C * 2 * E, du, row, e, 2 * E, C, E)
            put(dmixed_ptr + chunk * C * E, dmixed, row, e, E, C, E)
        state = tl.dot(tl.trans(q), dmixed, state, input_precision=PRECISION)
    if P > 1:
        put(totals_ptr + ends, state, s, e, E, S, E)
    if direction == 0:
        tl.store(dbias_ptr + (batch * P + part) * E + e, dbias, mask=e < E)


@triton.jit
def value_gradient_kernel(
    uv_ptr,
    bias_ptr,
    a_ptr,
    k_ptr,
    dmixed_ptr,
    dkv_ptr,
    unused_ptr,
    duv_ptr,
    dbias_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dv = (a^T dmixed + k dkv) silu'(v), written beside du, which the same buffer holds; grid [C, E, T]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(2).to(tl.int64)
    dv = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.program_id(0) * BLOCK_M
    for start in range(begin, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        a = tile(a_ptr + chunk * C * C, c, m, C, C, C)
        dmixed = tile(dmixed_ptr + chunk * C * E, c, e, E, C, E)
        dv = tl.dot(tl.trans(a), dmixed, dv, input_precision=PRECISION)
    for start in range(0, F, BLOCK_K):
        f = start + tl.arange(0, BLOCK_K)
        k = tile(k_ptr + chunk * C * F, m, f, F, C, F)
        dkv = tile(dkv_ptr + chunk * F * E, f, e, E, F, E)
        dv = tl.dot(k, dkv, dv, input_precision=PRECISION)
    v = tile(uv_ptr + chunk * C * 2 * E + E, m, e, 2 * E, C, E).to(tl.float32) + _bias(bias_ptr + E, e, E)
    sigmoid = _sigmoid(v)
    dv *= sigmoid * (1 + v * (1 - sigmoid))
    put(duv_ptr + chunk * C * 2 * E + E, dv, m, e, 2 * E, C, E)
    partial = (chunk * tl.num_programs(0) + tl.program_id(0)) * E
    tl.store(dbias_ptr + partial + e, tl.sum(dv, axis=0), mask=e < E)


@triton.jit
def weight_gradient_kernel(
    uv_ptr,
    bias_ptr,
    m_ptr,
    dmixed_ptr,
    dkv_ptr,
    da_ptr,
    dq_ptr,
    dk_ptr,
    C: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """da = dmixed silu(v)^T, dq = dmixed m^T and dk = silu(v) dkv^T, one tile of one of them a program.

    Grid [tiles of C x C, then of C x F twice; T]. With CAUSAL the tiles above the diagonal are zeros.
    """
    across: tl.constexpr = (C + BLOCK_M - 1) // BLOCK_M
    across_f: tl.constexpr = (F + BLOCK_M - 1) // BLOCK_M
    number = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    uv_ptr += chunk * C * 2 * E
    dmixed_ptr += chunk * C * E
    x = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    result = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    if number < across * across:
        row = (number // across) * BLOCK_M + x
        col = (number % across) * BLOCK_M + x
        end = E
        if CAUSAL:
            end = tl.where(number % across <= number // across, E, 0)
        for start in range(0, end, BLOCK_K):
            e = start + k
            dmixed = tile(dmixed_ptr, row, e, E, C, E)
            v = tile(uv_ptr + E, col, e, 2 * E, C, E).to(tl.float32) + _bias(bias_ptr + E, e, E)[None, :]
            result = tl.dot(dmixed, tl.trans(_silu(v).to(dmixed.dtype)), result, input_precision=PRECISION)
        put(da_ptr + chunk * C * C, result, row, col, C, C, C)
    elif number < across * (across + across_f):
        number -= across * across
        row = (number // across_f) * BLOCK_M + x
        col = (number % across_f) * BLOCK_M + x
        for start in range(0, E, BLOCK_K):
            e = start + k
            dmixed = tile(dmixed_ptr, row, e, E, C, E)
            state = tile(m_ptr + chunk * F * E, col, e, E, F, E)
            result = tl.dot(dmixed, tl.trans(state), result, input_precision=PRECISION)
        put(dq_ptr + chunk * C * F, result, row, col, F, C, F)
    else:
        number -= across * (across + across_f)
        row = (number // across_f) * BLOCK_M + x
        col = (number % across_f) * BLOCK_M + x
        for start in range(0, E, BLOCK_K):
            e = start + k
            v = tile(uv_ptr + E, row, e, 2 * E, C, E).to(tl.float32) + _bias(bias_ptr + E, e, E)[None, :]
            dkv = tile(dkv_ptr + chunk * F * E, col, e, E, F, E)
            result = tl.dot(_silu(v).to(dkv.dtype), tl.trans(dkv), result, input_precision=PRECISION)
        put(dk_ptr + chunk * C * F, result, row, col, F, C, F)
