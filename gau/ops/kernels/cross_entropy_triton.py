"""Triton kernel of the vocabulary loss: a row of logits is read once and leaves as its gradient.

Bytes are of 65,536 tokens and 32,128 columns, logits in float16 and gradients in bfloat16.
"""

import triton
import triton.language as tl

LARGEST_HALF = tl.constexpr(65_504.0)


@triton.jit
def _widened(logits):
    """Logits in float32. What was too large for a matmul in float16 is its largest number; NaN stays NaN."""
    wide = logits.to(tl.float32)
    if logits.dtype == tl.float16:
        wide = tl.clamp(wide, -LARGEST_HALF, LARGEST_HALF, propagate_nan=tl.PropagateNan.ALL)
    return wide


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, weights_ptr, nll_ptr, dlogits_ptr,
    V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """nll = log sum exp(logits) - logits[target], dlogits = weight (softmax - onehot).

    Of a row's COLUMNS the first V are logits; what stands after them is not read, and its gradient is zero.

    Grid    [rows], one for each target
    Tile    a whole row [BLOCK_V], in registers
    Reads   logits [rows, COLUMNS]; targets and weights [rows]
    Writes  nll [rows]; dlogits [rows, COLUMNS]
    Bytes   8.4 GB a step: logits, dlogits
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
    # One division for the row: one for each number would take longer than to read and to write the row.
    dlogits = powers * (weight / total) - tl.where(v == target, weight, 0.0)
    tl.store(dlogits_ptr + row * COLUMNS + v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=v < COLUMNS)
