"""What the Triton kernels of gated attention share: silu, and the gradient of a gate from what it let through.

Of o = silu(u) x the backward pass needs x for the gradient of u. It is o / silu(u), so o alone is kept, which the
product after the gate keeps anyway.
"""

import triton
import triton.language as tl

# How near to 0 a gate before silu may come, and how far below: silu of it divides what it let through.
SMALLEST_GATE, LOWEST_GATE = tl.constexpr(1e-20), tl.constexpr(-60.0)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): a reciprocal root, squared, is three instructions; a division takes six."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def for_gate(u):
    """u, where silu(u) is no less than 1e-25: o / silu(u) must exist. It changes o by less than 1e-20 x."""
    u = tl.where(tl.abs(u) < SMALLEST_GATE, SMALLEST_GATE, u)
    return tl.where(u < LOWEST_GATE, LOWEST_GATE, u)


@triton.jit
def gate_gradient(u, o, do):
    """The gradient of u for o = silu(u) x, where u is from `for_gate`: do o silu'(u) / silu(u)."""
    return do * (o / u) * (1 + u * (1 - sigmoid(u)))


@triton.jit
def silu_gradient(x):
    """The derivative of silu at x."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))
