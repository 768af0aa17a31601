"""Queries and keys of a GAU, all from one projection (docs/paper.md sections 1 and 3).

    z = silu(Z)      y[role] = rope(z * gamma[role] + beta[role])

Keys, every second role, may be of z mixed with that of the token before, (1 - m) z_n + m z_(n - 1), where both are of
one document (`gau.layers.short_convolution.KeyShift`).

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
    shift: tuple[Array, Array] | None = None,
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
      shift: m [S], and float32 [B, N]: 1 where a token has the one before it in its document, 0 elsewhere, which has no
        gradient; or None: keys are of z.
      rotated: how many of the roles, the first ones, are rotated.
    """
    dtype = p_BNW.dtype
    z_BNS = p_BNW[..., -bias_S.size :].astype(jnp.promote_types(dtype, gamma_RS.dtype))
    z_BNS = jax.nn.silu(z_BNS + bias_S)
    of_keys_BNS = z_BNS
    if shift is not None:
        mix_S, follows_BN = shift
        before_BNS = jnp.roll(z_BNS, 1, axis=1) * jax.lax.stop_gradient(follows_BN)[..., None]
        of_keys_BNS = z_BNS + mix_S * (before_BNS - z_BNS)
    scales = enumerate(zip(gamma_RS, beta_RS, strict=True))
    roles = [(of_keys_BNS if role % 2 else z_BNS) * gamma_S + beta_S for role, (gamma_S, beta_S) in scales]
    if table is not None:
        roles[:rotated] = [apply_rope(y_BNS, table) for y_BNS in roles[:rotated]]
    return tuple(y_BNS.astype(dtype) for y_BNS in roles), p_BNW
