"""What all Triton kernels share: loading and storing tiles that may stick out of an array."""

import triton
import triton.language as tl


@triton.jit
def in_bounds(index, size):
    """Whether each index is below `size`; if that is None all are, and a mask that is constant costs nothing."""
    return tl.full(index.shape, 1, tl.int1) if size is None else index < size


@triton.jit
def load_tile(ptr, row, col, stride: tl.constexpr, rows, cols: tl.constexpr):
    """Loads ptr[row, col], [len(row), len(col)]; 0 outside [rows, cols], where None is no bound."""
    mask = in_bounds(row, rows)[:, None] & in_bounds(col, cols)[None, :]
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, value, row, col, stride, rows: tl.constexpr, cols):
    """Stores a tile at ptr[row, col], in the type of ptr; what lies outside [rows, cols] is left out."""
    mask = in_bounds(row, rows)[:, None] & in_bounds(col, cols)[None, :]
    tl.store(ptr + row[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=mask)
