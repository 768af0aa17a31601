"""Triton kernel of the vocabulary loss: a row of logits is read once and leaves as its gradient."""

import triton
import triton.language as tl

LARGEST_HALF = tl.constexpr(65_504.0)


@triton.jit
def _widened(logits):
    """Logits in float32. What was too large for a product in float16 is its largest number; NaN stays NaN."""
    wide = logits.to(tl.float32)
    if logits.dtype == tl.float16:
        wide = tl.clamp(wide, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    return wide


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    nll_ptr,
    dlogits_ptr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """nll = log sum exp(logits) - logits[target], dlogits = weight (softmax - onehot); a row a program.

    Of a row's COLUMNS the first V are logits; what stands after them is not read, and its gradient is zero.
    """
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    weight = tl.load(weights_ptr + row)
    at_target = _widened(tl.load(logits_ptr + row * COLUMNS + target))
    logits = tl.where(v < V, _widened(tl.load(logits_ptr + row * COLUMNS + v, mask=v < V, other=0.0)), -float('inf'))
    top = tl.max(logits, axis=0)
    powers = tl.exp(logits - top)
    total = tl.sum(powers, axis=0)
    tl.store(nll_ptr + row, tl.log(total) + top - at_target)
    # No division in it: that would take longer than to read and to write the row.
    dlogits = powers * (weight / total) - tl.where(v == target, weight, 0.0)
    tl.store(dlogits_ptr + row * COLUMNS + v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=v < COLUMNS)
