"""Queries and keys of a GAU, all from one projection (docs/paper.md sections 1 and 3).

    z = silu(Z)      y[role] = rope(z * gamma[role] + beta[role])

Z is the projection X Wz before its bias and silu; where one matmul makes it with those of U and V, they share a
buffer. FLASH-Quad has the roles q and k, FLASH those and two more for its linear attention.
`gau.ops.kernels.queries_keys` is the fast path.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.positions import apply_rope


def queries_and_keys(
    p_BNW: Array,
    bias_S: Array,
    gamma_RS: Array,
    beta_RS: Array,
    table: tuple[Array, Array] | None,
    *,
    rotated: int,
) -> tuple[tuple[Array, ...], Array]:
    """Returns rope(silu(z + bias) * gamma + beta) of each of R roles, R arrays [B, N, S] in the dtype of p, and p.

    The arithmetic is the parameters' (float32 or better), from the projection to the results. Who reads other columns
    of p takes it from here: the gradients of all columns then come back in one buffer, and none is copied or added up.

    Args:
      p_BNW: projections, that of z in the last S columns; finite at padding.
      bias_S: its bias.
      gamma_RS: scale of each role.
      beta_RS: offset of each role.
      table: what `gau.ops.positions.rope_table` returned for width S, of B rows or of one for all; None: no rotation.
      rotated: how many of the roles, the first ones, are rotated.
    """
    dtype = p_BNW.dtype
    z_BNS = p_BNW[..., -bias_S.size :].astype(jnp.promote_types(dtype, gamma_RS.dtype))
    z_BNS = jax.nn.silu(z_BNS + bias_S)
    roles = [z_BNS * gamma_S + beta_S for gamma_S, beta_S in zip(gamma_RS, beta_RS, strict=True)]
    if table is not None:
        roles[:rotated] = [apply_rope(y_BNS, table) for y_BNS in roles[:rotated]]
    return tuple(y_BNS.astype(dtype) for y_BNS in roles), p_BNW
