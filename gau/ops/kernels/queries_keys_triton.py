"""Triton kernels of a GAU's queries and keys (`gau.ops.queries_keys` says what they are).

A row is one token of the batch, ROWS in all; z stands in the last S of the W columns of the projections p. The
rotation pairs column i with column i + S/2, so the two halves of a row are tiles of their own; without rotation S may
be odd, and the second half is shorter by one column. A table of cosines and sines has a row for each token of the
batch, or for each token of one sequence if all sequences share it, or it is missing (TABLE_ROWS = 0). The first ROTATED
roles are rotated by it.

Where keys are shifted (SHIFTED), those of a row are of z mixed with z of the row before, if that is of the same
document (`follows` is 1); a part of the gradient of z comes from the row after.

Bytes are of size base (S = 128, four roles) with 65,536 tokens in bfloat16, where an array of [ROWS, S] has 17 MB.
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile, store_tile


@triton.jit
def _load_halves(ptr, row, col, rows: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    """Loads both halves of the last S of W columns, float32 [BLOCK_R, BLOCK_H] each."""
    H: tl.constexpr = (S + 1) // 2
    first = load_tile(ptr + W - S, row, col, W, rows, H).to(tl.float32)
    second = load_tile(ptr + W - S + H, row, col, W, rows, S - H).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(ptr, first, second, row, col, rows: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    H: tl.constexpr = (S + 1) // 2
    store_tile(ptr + W - S, first, row, col, W, rows, H)
    store_tile(ptr + W - S + H, second, row, col, W, rows, S - H)


@triton.jit
def _load_angles(cos_ptr, sin_ptr, row, col, TABLE_ROWS: tl.constexpr, H: tl.constexpr):
    row = row % TABLE_ROWS
    return load_tile(cos_ptr, row, col, H, TABLE_ROWS, H), load_tile(sin_ptr, row, col, H, TABLE_ROWS, H)


@triton.jit
def _load_z(p_ptr, bias_ptr, row, col, rows: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    """Loads both halves of z before silu, with its bias."""
    x1, x2 = _load_halves(p_ptr, row, col, rows, S, W)  # [BR, BH] each
    bias1, bias2 = _load_halves(bias_ptr, tl.arange(0, 1), col, 1, S, S)  # [1, BH] each
    return x1 + bias1, x2 + bias2


@triton.jit
def _load_z_before(p_ptr, bias_ptr, follows_ptr, row, col, rows: tl.constexpr, S: tl.constexpr, W: tl.constexpr):
    """Loads both halves of silu(z + bias) of the row before each, zeros where there is none of its document."""
    follows = tl.load(follows_ptr + row, mask=row < rows, other=0.0)[:, None]  # [BR, 1]
    x1, x2 = _load_z(p_ptr, bias_ptr, tl.maximum(row - 1, 0), col, rows, S, W)
    # Padding may hold anything that is finite.
    return tl.where(follows > 0, x1 * tl.sigmoid(x1), 0.0), tl.where(follows > 0, x2 * tl.sigmoid(x2), 0.0)


@triton.jit
def _turned_back(dy1, dy2, cos, sin):
    return dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin


@triton.jit
def queries_keys_kernel(
    p_ptr, bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, mix_ptr, follows_ptr, q_ptr, k_ptr, q_lin_ptr, k_lin_ptr,
    ROLES: tl.constexpr, ROTATED: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr, TABLE_ROWS: tl.constexpr,
    S: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """y[role] = rope(silu(z + bias) gamma[role] + beta[role]). Pointers of roles from ROLES on are not used.

    Grid    [ROWS / BLOCK_R]
    Tile    two halves [BLOCK_R, S / 2] of whole rows
    Reads   z, the last S columns of p [ROWS, W]; bias [S]; gamma and beta [ROLES, S]; cos and sin [TABLE_ROWS, S / 2];
            if SHIFTED, mix [S] and follows [ROWS]
    Writes  ROLES arrays y [ROWS, S]
    Bytes   84 MB a layer: z; four roles
    """
    y_ptrs = (q_ptr, k_ptr, q_lin_ptr, k_lin_ptr)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_H)
    only = tl.arange(0, 1)
    z1, z2 = _load_z(p_ptr, bias_ptr, row, col, ROWS, S, W)  # [BR, BH] each
    z1 *= tl.sigmoid(z1)
    z2 *= tl.sigmoid(z2)
    k1, k2 = z1, z2
    if SHIFTED:
        before1, before2 = _load_z_before(p_ptr, bias_ptr, follows_ptr, row, col, ROWS, S, W)
        mix1, mix2 = _load_halves(mix_ptr, only, col, 1, S, S)  # [1, BH] each
        k1 += mix1 * (before1 - z1)
        k2 += mix2 * (before2 - z2)
    if TABLE_ROWS:
        cos, sin = _load_angles(cos_ptr, sin_ptr, row, col, TABLE_ROWS, S // 2)  # [BR, BH] each
    for role in tl.static_range(ROLES):
        gamma1, gamma2 = _load_halves(gamma_ptr + role * S, only, col, 1, S, S)
        beta1, beta2 = _load_halves(beta_ptr + role * S, only, col, 1, S, S)
        # Every second role is one of keys.
        y1 = (k1 if role % 2 else z1) * gamma1 + beta1
        y2 = (k2 if role % 2 else z2) * gamma2 + beta2
        if TABLE_ROWS and role < ROTATED:
            y1, y2 = y1 * cos - y2 * sin, y2 * cos + y1 * sin
        _store_halves(y_ptrs[role], y1, y2, row, col, ROWS, S, S)


@triton.jit
def queries_keys_gradient_kernel(
    p_ptr, bias_ptr, gamma_ptr, cos_ptr, sin_ptr, mix_ptr, follows_ptr, dq_ptr, dk_ptr, dq_lin_ptr, dk_lin_ptr,
    unused_ptr, dp_ptr, sums_ptr,
    ROLES: tl.constexpr, ROTATED: tl.constexpr, SHIFTED: tl.constexpr, ROWS: tl.constexpr, TABLE_ROWS: tl.constexpr,
    S: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dz = gradient of z, dgamma = sum of drope(dy) silu(z + bias), dbeta = sum of drope(dy), dbias = sum of dz; dmix.

    A program takes every tile of rows whose number is its own plus a multiple of the programs, and has its sums in
    registers, one for each place in a tile: only the last step sums over the rows of a tile, which takes shuffles.

    Grid    [programs], as many as the GPU runs at once
    Tile    two halves [BLOCK_R, S / 2] of whole rows
    Reads   z, the last S columns of p [ROWS, W]; bias [S]; gamma [ROLES, S]; cos and sin [TABLE_ROWS, S / 2]; ROLES
            arrays dy [ROWS, S]; the last S columns of dp [ROWS, W], what other readers of z left there; if SHIFTED,
            mix [S], follows [ROWS], and of keys the rows after those of a tile
    Writes  dz added to that in dp, which takes over the buffer of `unused_ptr`; sums [programs, 2 ROLES + 1 + SHIFTED,
            S], a program's part of dgamma, dbeta, dbias and dmix, one below the other
    Bytes   117 MB a layer: z, four dy, the columns of dp; these again
    """
    dy_ptrs = (dq_ptr, dk_ptr, dq_lin_ptr, dk_lin_ptr)
    col = tl.arange(0, BLOCK_H)
    only = tl.arange(0, 1)
    zeros = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    sums = ((zeros, zeros, zeros, zeros),) * ROLES
    dbias1 = zeros
    dbias2 = zeros
    dmix1 = zeros
    dmix2 = zeros
    for start in range(tl.program_id(0) * BLOCK_R, ROWS, tl.num_programs(0) * BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        x1, x2 = _load_z(p_ptr, bias_ptr, row, col, ROWS, S, W)  # [BR, BH] each
        sigmoid1 = tl.sigmoid(x1)
        sigmoid2 = tl.sigmoid(x2)
        z1 = x1 * sigmoid1
        z2 = x2 * sigmoid2
        k1, k2 = z1, z2
        if SHIFTED:
            before1, before2 = _load_z_before(p_ptr, bias_ptr, follows_ptr, row, col, ROWS, S, W)
            mix1, mix2 = _load_halves(mix_ptr, only, col, 1, S, S)  # [1, BH] each
            k1 += mix1 * (before1 - z1)
            k2 += mix2 * (before2 - z2)
        if TABLE_ROWS:
            cos, sin = _load_angles(cos_ptr, sin_ptr, row, col, TABLE_ROWS, S // 2)
        dz1 = zeros
        dz2 = zeros
        dk1 = zeros
        dk2 = zeros
        new_sums = ()
        for role in tl.static_range(ROLES):
            dy1, dy2 = _load_halves(dy_ptrs[role], row, col, ROWS, S, S)  # [BR, BH] each
            if TABLE_ROWS and role < ROTATED:
                dy1, dy2 = _turned_back(dy1, dy2, cos, sin)
            gamma1, gamma2 = _load_halves(gamma_ptr + role * S, only, col, 1, S, S)
            if SHIFTED and role % 2:
                dk1 += dy1 * gamma1
                dk2 += dy2 * gamma2
            else:
                dz1 += dy1 * gamma1
                dz2 += dy2 * gamma2
            dgamma1, dgamma2, dbeta1, dbeta2 = sums[role]
            of1 = k1 if role % 2 else z1
            of2 = k2 if role % 2 else z2
            new_sums += ((dgamma1 + dy1 * of1, dgamma2 + dy2 * of2, dbeta1 + dy1, dbeta2 + dy2),)
        sums = new_sums
        if SHIFTED:
            dmix1 += dk1 * (before1 - z1)
            dmix2 += dk2 * (before2 - z2)
            after1, after2 = _keys_gradient_after(
                dk_ptr, dk_lin_ptr, gamma_ptr, cos_ptr, sin_ptr, follows_ptr, row + 1, col,
                ROLES, ROTATED, ROWS, TABLE_ROWS, S,
            )  # fmt: skip
            dz1 += dk1 + mix1 * (after1 - dk1)
            dz2 += dk2 + mix2 * (after2 - dk2)
        dz1 *= sigmoid1 + z1 * (1 - sigmoid1)
        dz2 *= sigmoid2 + z2 * (1 - sigmoid2)
        dbias1 += dz1
        dbias2 += dz2
        left1, left2 = _load_halves(dp_ptr, row, col, ROWS, S, W)  # [BR, BH] each
        _store_halves(dp_ptr, dz1 + left1, dz2 + left2, row, col, ROWS, S, W)
    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * ROLES + 1 + SHIFTED) * S
    for role in tl.static_range(ROLES):
        dgamma1, dgamma2, dbeta1, dbeta2 = sums[role]
        _store_sums(sums_ptr + role * S, dgamma1, dgamma2, col, S)
        _store_sums(sums_ptr + (ROLES + role) * S, dbeta1, dbeta2, col, S)
    _store_sums(sums_ptr + 2 * ROLES * S, dbias1, dbias2, col, S)
    if SHIFTED:
        _store_sums(sums_ptr + (2 * ROLES + 1) * S, dmix1, dmix2, col, S)


@triton.jit
def _keys_gradient_after(
    dk_ptr, dk_lin_ptr, gamma_ptr, cos_ptr, sin_ptr, follows_ptr, row, col,
    ROLES: tl.constexpr, ROTATED: tl.constexpr, ROWS: tl.constexpr, TABLE_ROWS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The gradient of what keys are made of, both halves, in the rows after; zeros where one begins a document."""
    dy_ptrs = (dk_ptr, dk_lin_ptr)
    only = tl.arange(0, 1)
    follows = tl.load(follows_ptr + row, mask=row < ROWS, other=0.0)[:, None]  # [BR, 1]
    if TABLE_ROWS:
        cos, sin = _load_angles(cos_ptr, sin_ptr, row, col, TABLE_ROWS, S // 2)
    dk1 = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    dk2 = tl.zeros((row.shape[0], col.shape[0]), tl.float32)
    for role in tl.static_range(1, ROLES, 2):
        dy1, dy2 = _load_halves(dy_ptrs[role // 2], row, col, ROWS, S, S)
        if TABLE_ROWS and role < ROTATED:
            dy1, dy2 = _turned_back(dy1, dy2, cos, sin)
        gamma1, gamma2 = _load_halves(gamma_ptr + role * S, only, col, 1, S, S)
        dk1 += dy1 * gamma1
        dk2 += dy2 * gamma2
    return dk1 * follows, dk2 * follows


@triton.jit
def _store_sums(ptr, first, second, col, S: tl.constexpr):
    only = tl.arange(0, 1)
    _store_halves(ptr, tl.sum(first, axis=0)[None, :], tl.sum(second, axis=0)[None, :], only, col, 1, S, S)
