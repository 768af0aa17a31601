"""Triton kernel of the vocabulary loss: a row of logits is read once and leaves as its gradient."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, weights_ptr, nll_ptr, dlogits_ptr, V: tl.constexpr, BLOCK_V: tl.constexpr
):
    """nll = log sum exp(logits) - logits[target], dlogits = weight (softmax - onehot); a row a program."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + row)
    weight = tl.load(weights_ptr + row)
    at_target = tl.load(logits_ptr + row * V + target).to(tl.float32)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float('-inf')).to(tl.float32)
    top = tl.max(logits, axis=0)
    powers = tl.exp(logits - top)
    total = tl.sum(powers, axis=0)
    tl.store(nll_ptr + row, tl.log(total) + top - at_target)
    # No division in it: that would take longer than to read and to write the row.
    dlogits = powers * (weight / total) - tl.where(v == target, weight, 0.0)
    tl.store(dlogits_ptr + row * V + v, dlogits.to(dlogits_ptr.dtype.element_ty), mask=v < V)
