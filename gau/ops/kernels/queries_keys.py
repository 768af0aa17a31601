"""Queries and keys from their projection on a GPU: one kernel forwards, one backwards, where the compiler makes dozens.

The projection Z is narrow, so what this costs is reading and writing: forwards Z is read once and every role written
once, backwards every role's gradient and Z are read and the gradient of Z is written.

The gradients of the parameters are sums over all tokens. A bounded number of programs walks over the rows, each with
its sums in registers, and what is left to add up is small.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two
from gau.ops.tracing import traced_once

# Roles that the kernels have pointers for.
ROLES = 4
# Numbers in a program's tile of half the width, forwards and backwards. Backwards a thread then holds four numbers of
# each of 18 sums, in all 168 registers at four roles; with twice as many they spill.
BLOCK, GRADIENT_BLOCK = 2048, 512
# Programs of the backward pass at most: as many as the registers of an H100 hold at once, three a multiprocessor.
PROGRAMS = 396


@traced_once()
def queries_and_keys(
    p_BNW: Array, bias_S: Array, gamma_RS: Array, beta_RS: Array, table: tuple[Array, Array] | None
) -> tuple[tuple[Array, ...], Array]:
    """Returns what the reference `gau.ops.queries_keys.queries_and_keys` does, for up to four roles.

    Args:
      p_BNW: projections, bfloat16 or float32, that of z in the last S columns; finite at padding.
      bias_S: the bias of z, float32.
      gamma_RS: scales of up to four roles, float32.
      beta_RS: offsets, float32.
      table: cosines and sines, float32 [B or 1, N, S/2]; no gradient goes there. Or None.
    """
    return _queries_and_keys(p_BNW, bias_S, gamma_RS, beta_RS, table)


@jax.custom_vjp
def _queries_and_keys(p_BNW, bias_S, gamma_RS, beta_RS, table):
    return _forward(p_BNW, bias_S, gamma_RS, beta_RS, table)[0]


def _forward(p_BNW, bias_S, gamma_RS, beta_RS, table):
    from gau.ops.kernels.queries_keys_triton import queries_keys_kernel

    roles, width = gamma_RS.shape
    rows, block_r, fields = _sizes(p_BNW, gamma_RS, table, BLOCK)
    like = jax.ShapeDtypeStruct((*p_BNW.shape[:-1], width), p_BNW.dtype)
    unused = jax.ShapeDtypeStruct((1,), p_BNW.dtype)
    results = launch(
        queries_keys_kernel,
        p_BNW,
        bias_S,
        gamma_RS,
        beta_RS,
        *(table or (p_BNW, p_BNW)),
        outputs=[like] * roles + [unused] * (ROLES - roles),
        grid=(-(-rows // block_r),),
        num_warps=4,
        num_stages=1,
        **fields,
    )
    return (tuple(results[:roles]), p_BNW), (p_BNW, bias_S, gamma_RS, beta_RS, table)


def _backward(residuals, gradients):
    from gau.ops.kernels.queries_keys_triton import queries_keys_gradient_kernel

    p_BNW, bias_S, gamma_RS, beta_RS, table = residuals
    droles, dp_BNW = gradients
    roles, width = gamma_RS.shape
    rows, block_r, fields = _sizes(p_BNW, gamma_RS, table, GRADIENT_BLOCK)
    programs = min(-(-rows // block_r), PROGRAMS)
    dp_BNW, sums = launch(
        queries_keys_gradient_kernel,
        p_BNW,
        bias_S,
        gamma_RS,
        *(table or (p_BNW, p_BNW)),
        *droles,
        *[p_BNW] * (ROLES - roles),
        dp_BNW,
        outputs=[
            jax.ShapeDtypeStruct(p_BNW.shape, p_BNW.dtype),
            jax.ShapeDtypeStruct((programs, 2 * roles + 1, width), jnp.float32),
        ],
        grid=(programs,),
        num_warps=4,
        num_stages=1,
        overwrite={5 + ROLES: 0},
        **fields,
    )
    dgamma_RS, dbeta_RS, dbias_1S = jnp.split(sums.sum(0), [roles, 2 * roles])
    return (
        dp_BNW,
        dbias_1S[0].astype(bias_S.dtype),
        dgamma_RS.astype(gamma_RS.dtype),
        dbeta_RS.astype(beta_RS.dtype),
        None,
    )


_queries_and_keys.defvjp(_forward, _backward)


def _sizes(p: Array, gamma: Array, table: tuple[Array, Array] | None, block: int) -> tuple[int, int, dict[str, Any]]:
    """Returns the rows of p, how many of them a tile has, and the constants of both kernels."""
    roles, width = gamma.shape
    rows, stride = p.size // p.shape[-1], p.shape[-1]
    block_h = power_of_two(-(-width // 2))
    block_r = max(1, block // block_h)
    table_rows = 0 if table is None else table[0].size // table[0].shape[-1]
    fields = {'ROLES': roles, 'ROWS': rows, 'TABLE_ROWS': table_rows, 'S': width, 'W': stride}
    return rows, block_r, fields | {'BLOCK_R': block_r, 'BLOCK_H': block_h}
