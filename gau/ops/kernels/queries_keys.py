"""Queries and keys from their projection on a GPU: one kernel forwards, one backwards, where the compiler makes dozens.

The gradients of the parameters are sums over all tokens. A bounded number of programs walks over the rows, each with
its sums in registers, and what is left to add up is small.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two

# Roles that the kernels have pointers for.
ROLES = 4
# Numbers in a program's tile of half the width, forwards and backwards. Backwards a thread then holds four numbers of
# each of 18 sums, in all 168 registers at four roles; with twice as many they spill.
BLOCK, GRADIENT_BLOCK = 2048, 1024
# Programs of the backward pass at most: as many as the registers of an H100 hold at once, three a multiprocessor.
PROGRAMS = 396


@jax.custom_vjp
def fused_queries_and_keys(
    z_BNS: Array, bias_S: Array, gamma_RS: Array, beta_RS: Array, table: tuple[Array, Array] | None
) -> tuple[Array, ...]:
    """Returns what `gau.ops.queries_keys.queries_and_keys` does, with the arithmetic in float32.

    Args:
      z_BNS: projection, bfloat16 or float32.
      bias_S: its bias, float32.
      gamma_RS: scales of up to four roles, float32.
      beta_RS: offsets, float32.
      table: cosines and sines, float32 [B or 1, N, S/2]; no gradient goes there. Or None.
    """
    from gau.ops.kernels.queries_keys_triton import queries_keys_kernel

    roles = gamma_RS.shape[0]
    rows, block_r, fields = _sizes(z_BNS, roles, table, BLOCK)
    like, unused = jax.ShapeDtypeStruct(z_BNS.shape, z_BNS.dtype), jax.ShapeDtypeStruct((1,), z_BNS.dtype)
    results = launch(
        queries_keys_kernel,
        z_BNS,
        bias_S,
        gamma_RS,
        beta_RS,
        *(table or (z_BNS, z_BNS)),
        outputs=[like] * roles + [unused] * (ROLES - roles),
        grid=(-(-rows // block_r),),
        num_warps=4,
        num_stages=1,
        **fields,
    )
    return tuple(results[:roles])


def _forward(z_BNS, bias_S, gamma_RS, beta_RS, table):
    return fused_queries_and_keys(z_BNS, bias_S, gamma_RS, beta_RS, table), (z_BNS, bias_S, gamma_RS, beta_RS, table)


def _backward(residuals, gradients):
    from gau.ops.kernels.queries_keys_triton import queries_keys_gradient_kernel

    z_BNS, bias_S, gamma_RS, beta_RS, table = residuals
    roles, width = gamma_RS.shape
    rows, block_r, fields = _sizes(z_BNS, roles, table, GRADIENT_BLOCK)
    programs = min(-(-rows // block_r), PROGRAMS)
    dz_BNS, sums = launch(
        queries_keys_gradient_kernel,
        z_BNS,
        bias_S,
        gamma_RS,
        *(table or (z_BNS, z_BNS)),
        *gradients,
        *[z_BNS] * (ROLES - roles),
        outputs=[
            jax.ShapeDtypeStruct(z_BNS.shape, z_BNS.dtype),
            jax.ShapeDtypeStruct((programs, 2 * roles + 1, width), jnp.float32),
        ],
        grid=(programs,),
        num_warps=4,
        num_stages=1,
        **fields,
    )
    dgamma_RS, dbeta_RS, dbias_1S = jnp.split(sums.sum(0), [roles, 2 * roles])
    return (
        dz_BNS,
        dbias_1S[0].astype(bias_S.dtype),
        dgamma_RS.astype(gamma_RS.dtype),
        dbeta_RS.astype(beta_RS.dtype),
        None,
    )


fused_queries_and_keys.defvjp(_forward, _backward)


def _sizes(z: Array, roles: int, table: tuple[Array, Array] | None, block: int) -> tuple[int, int, dict[str, Any]]:
    """Returns the rows of z, how many of them a tile has, and the constants of both kernels."""
    rows, width = z.size // z.shape[-1], z.shape[-1]
    block_h = power_of_two(-(-width // 2))
    block_r = max(1, block // block_h)
    table_rows = 0 if table is None else table[0].size // table[0].shape[-1]
    fields = {'ROLES': roles, 'ROWS': rows, 'TABLE_ROWS': table_rows, 'S': width}
    return rows, block_r, fields | {'BLOCK_R': block_r, 'BLOCK_H': block_h}
