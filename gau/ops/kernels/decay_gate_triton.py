"""What Triton kernels share where a gate decides what a state keeps over a chunk (`gau.ops.gated_states`).

One number for a state: d = sigmoid(mean of the logits of a chunk's tokens), logits = h w + b for h = ScaleNorm(x).
"""

import triton
import triton.language as tl

from gau.ops.kernels.load_store import load_tile


@triton.jit
def gate_logits(
    x_ptr, g_ptr, w_ptr, bias_ptr, row, R: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the logits of these rows of x [R, D], float32 [BLOCK_M]; g is the scale of the norm, bias one number.

    w is rounded to the type of x here: to cast it before would be a launch in each layer and for each token.
    """
    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, row, d, D, R, D).to(tl.float32)  # [BM, BK]
        w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        products += x * w[None, :]
        squares += x * x
    scale = tl.load(g_ptr) / tl.sqrt(tl.sum(squares, axis=1) / D + EPSILON)
    return tl.sum(products, axis=1) * scale + tl.load(bias_ptr)


@triton.jit
def log_decays(logits_ptr, before, C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns log2 d of the chunks 0 to `before` - 1 whose logits stand one after the other, [BLOCK_G]; then zeros."""
    chunk = tl.arange(0, BLOCK_G)
    c = tl.arange(0, BLOCK_C)
    mask = (chunk < before)[:, None] & (c < C)[None, :]
    logits = tl.load(logits_ptr + chunk[:, None] * C + c[None, :], mask=mask, other=0.0)  # [BG, BC]
    x = tl.sum(logits, axis=1) / C
    log_sigmoid = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    return tl.where(chunk < before, log_sigmoid * 1.4426950408889634, 0.0)


@triton.jit
def weights_of_chunks(logits_ptr, n, C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns log2 of the decays of the first n chunks, and the weights of their tokens after them, [BLOCK_G] each."""
    chunk = tl.arange(0, BLOCK_G)
    logs = log_decays(logits_ptr, n, C, BLOCK_G, BLOCK_C)
    after = tl.sum(logs, axis=0) - tl.cumsum(logs, axis=0)
    return logs, tl.where(chunk < n, tl.exp2(after), 0.0)


@triton.jit
def scales_in_window(gate_ptr, count_ptr, chunk, C: tl.constexpr, MEAN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the factors of a token in chunk 0 or 1 of a window: on weights before its own chunk, and on the sum."""
    kept = tl.exp2(tl.sum(log_decays(gate_ptr, chunk, C, 1, BLOCK_C), axis=0))
    count = kept * tl.load(count_ptr) + (chunk * C).to(tl.float32)
    if MEAN:
        state_scale = 1.0 / tl.where(count > 0, count, 1.0)
    else:
        state_scale = tl.where(count > 0, 1.0, 1.0)
    return state_scale, kept * state_scale
