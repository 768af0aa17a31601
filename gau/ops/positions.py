"""Position encodings: rotary (RoPE), sinusoid, and the two forms of the relative bias (docs/paper.md section 2)."""

import jax
import jax.numpy as jnp
from jax import Array

ROPE_BASE = 10_000.0


def _angles(positions_BN: Array, half: int, dtype) -> Array:
    """Returns position * 10000^(-i/half) for i < half, [B, N, half], in at least float32."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    frequencies = ROPE_BASE ** (-jnp.arange(half, dtype=dtype) / half)
    return positions_BN.astype(dtype)[..., None] * frequencies


def rope_table(positions_BN: Array, width: int, *, dtype=jnp.float32) -> tuple[Array, Array]:
    """Returns the cosines and sines that `apply_rope` needs, two arrays [B, N, width/2], at least float32.

    Computed once per call of a model and shared by its layers.

    Args:
      positions_BN: integer positions, [B, N] or [1, N].
      width: even width of the vectors to rotate.
      dtype: compute type; float64 raises the precision of the table, nothing lowers it below float32.

    Raises:
      ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f'RoPE rotates pairs and needs an even width, not {width}')
    angles_BNh = _angles(positions_BN, width // 2, dtype)
    return jnp.cos(angles_BNh), jnp.sin(angles_BNh)


def apply_rope(x: Array, table: tuple[Array, Array]) -> Array:
    """Rotates the pairs (x[i], x[i + S/2]) of every token by its position (half-split form, docs/paper.md section 2).

    Args:
      x: [B, N, S] or, with heads, [B, H, N, S].
      table: what `rope_table` returned for width S.

    Returns:
      The rotated x, same shape and dtype; the arithmetic is the table's (float32 or better).
    """
    cos, sin = table
    if x.ndim == 4:
        cos, sin = cos[:, None], sin[:, None]
    x1, x2 = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def sinusoid(positions_BN: Array, width: int, *, dtype=jnp.float32) -> Array:
    """Returns the absolute encoding [sin | cos] of every position, [B, N, width], at least float32.

    Raises:
      ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f'the sinusoid has two halves and needs an even width, not {width}')
    angles_BNh = _angles(positions_BN, width // 2, dtype)
    return jnp.concatenate([jnp.sin(angles_BNh), jnp.cos(angles_BNh)], axis=-1)


def bias_matrix(bias_P: Array, n: int, m: int, *, first: int | Array = 0) -> Array:
    """Returns b[i, j] = bias of distance j - (first + i) for n queries and m keys, [n, m].

    Built by tiling a period of n + m and reading it in rows shorter by one, so that each row slips by one: the gradient
    is then a sum over rows and not a scatter.

    Args:
      bias_P: biases of the distances -(m - 1) to m - 1, [2 m - 1].
      n: number of queries.
      m: number of keys.
      first: place of the first query among the keys, up to m; rows of queries beyond the last key mean nothing.
    """
    # Padded for rows below the last key, which a last block of queries may have.
    window = jax.lax.dynamic_slice_in_dim(jnp.pad(bias_P, (n, 0)), m - first, n + m - 1)
    rows = jnp.tile(jnp.pad(window, (0, 1)), n)[: n * (n + m - 1)].reshape(n, n + m - 1)
    return rows[:, n - 1 :]


def toeplitz_bias(w: Array, n: int) -> Array:
    """Returns the bias of every distance between n positions, [2 n - 1]: the middle of a table of length 2m - 1.

    b[q, k] = w[k - q + m - 1] (docs/paper.md section 2).

    Raises:
      ValueError: the table is too short for n positions.
    """
    m = (w.shape[0] + 1) // 2
    if m < n:
        raise ValueError(f'a relative bias table for {m} positions cannot serve {n}')
    return w[m - n : m + n - 1]


def toeplitz_bias_at(w: Array, positions_BT: Array, n: int) -> Array:
    """Returns the rows of the matrix of `toeplitz_bias(w, n)` for queries at positions below the table's m, [B, T, n].

    Raises:
      ValueError: the table is too short for n positions.
    """
    m = (w.shape[0] + 1) // 2
    if m < n:
        raise ValueError(f'a relative bias table for {m} positions cannot serve {n}')
    return w[jnp.arange(n) - positions_BT[..., None] + m - 1]


def rotary_bias(a_S: Array, c_S: Array, n: int) -> Array:
    """Returns the bias of every distance between n positions, [2 n - 1], of b = rope(a) rope(c)^T.

    Both vectors stand at every position, rotated by it (docs/paper.md section 2); of a product of two rotations only
    the difference remains, so one vector may stay as it is. For any n, with 2S parameters.
    """
    width = a_S.shape[0]
    table = rope_table(jnp.arange(1 - n, n)[None], width, dtype=a_S.dtype)
    return apply_rope(jnp.broadcast_to(c_S, (1, 2 * n - 1, width)), table)[0] @ a_S


def rotary_bias_at(a_S: Array, c_S: Array, positions_BT: Array, n: int) -> Array:
    """Returns the rows of the matrix of `rotary_bias(a, c, n)` for queries at these positions, [B, T, n]."""
    width, dtype = a_S.shape[0], a_S.dtype
    a_BTS = jnp.broadcast_to(a_S, (*positions_BT.shape, width))
    c_1NS = jnp.broadcast_to(c_S, (1, n, width))
    rotated_a_BTS = apply_rope(a_BTS, rope_table(positions_BT, width, dtype=dtype))
    rotated_c_NS = apply_rope(c_1NS, rope_table(jnp.arange(n)[None], width, dtype=dtype))[0]
    return rotated_a_BTS @ rotated_c_NS.T
