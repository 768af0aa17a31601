"""Queries and keys from their projection on a GPU: one kernel forwards, one backwards, where the compiler makes dozens.

The projection Z is narrow, so what this costs is reading and writing: forwards Z is read once and every role written
once, backwards every role's gradient and Z are read and the gradient of Z is written.

The gradients of the parameters are sums over all tokens. A bounded number of programs goes through the rows, each with
its sums in registers, and what is left to add up is small.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import RowSumTiles, RowTiles, cdiv, power_of_two, rows_of
from gau.ops.tracing import traced_once

# Roles that the kernels have pointers for: an even number, since every second one is of keys.
ROLES = 4


@traced_once('rotated')
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
    """Returns what the reference `gau.ops.queries_keys.queries_and_keys` does; more than four roles in several calls.

    Args:
      p_BNW: projections, bfloat16 or float32, that of z in the last S columns; finite at padding.
      bias_S: the bias of z, float32.
      gamma_RS: scales, float32.
      beta_RS: offsets, float32.
      table: cosines and sines, float32 [B or 1, N, S/2]; no gradient goes there. Or None.
      shift: for keys that are mixed with those of the token before, float32 m [S] and [B, N]; or None.
      rotated: how many of the roles, the first ones, are rotated by the table.
    """
    results = []
    for first in range(0, len(gamma_RS), ROLES):
        some = slice(first, first + ROLES)
        # Each call takes p from the one before, so that all of them add to one gradient of it, in place.
        roles, p_BNW = _queries_and_keys(
            p_BNW, bias_S, gamma_RS[some], beta_RS[some], table, shift, min(max(rotated - first, 0), ROLES)
        )
        results += roles
    return tuple(results), p_BNW


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _queries_and_keys(p_BNW, bias_S, gamma_RS, beta_RS, table, shift, rotated):
    return _forward(p_BNW, bias_S, gamma_RS, beta_RS, table, shift, rotated)[0]


def _forward(p_BNW, bias_S, gamma_RS, beta_RS, table, shift, rotated):
    from gau.ops.kernels.queries_keys_triton import queries_keys_kernel

    roles, width = gamma_RS.shape
    tiles = tile_sizes.QUERIES_KEYS
    rows, fields = _sizes(p_BNW, gamma_RS, table, tiles)
    like = jax.ShapeDtypeStruct((*p_BNW.shape[:-1], width), p_BNW.dtype)
    unused = jax.ShapeDtypeStruct((1,), p_BNW.dtype)
    results = launch(
        queries_keys_kernel,
        p_BNW,
        bias_S,
        gamma_RS,
        beta_RS,
        *(table or (p_BNW, p_BNW)),
        *(shift or (p_BNW, p_BNW)),
        outputs=[like] * roles + [unused] * (ROLES - roles),
        grid=(cdiv(rows, fields['BLOCK_R']),),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        ROTATED=rotated,
        SHIFTED=shift is not None,
        **fields,
    )
    return (tuple(results[:roles]), p_BNW), (p_BNW, bias_S, gamma_RS, beta_RS, table, shift)


def _backward(rotated, residuals, gradients):
    from gau.ops.kernels.queries_keys_triton import queries_keys_gradient_kernel

    p_BNW, bias_S, gamma_RS, beta_RS, table, shift = residuals
    droles, dp_BNW = gradients
    roles, width = gamma_RS.shape
    tiles = tile_sizes.QUERIES_KEYS_GRADIENT if shift is None else tile_sizes.QUERIES_KEYS_GRADIENT_SHIFTED
    rows, fields = _sizes(p_BNW, gamma_RS, table, tiles)
    programs = min(cdiv(rows, fields['BLOCK_R']), tiles.max_programs)
    dp_BNW, sums = launch(
        queries_keys_gradient_kernel,
        p_BNW,
        bias_S,
        gamma_RS,
        *(table or (p_BNW, p_BNW)),
        *(shift or (p_BNW, p_BNW)),
        *droles,
        *[p_BNW] * (ROLES - roles),
        dp_BNW,
        outputs=[
            jax.ShapeDtypeStruct(p_BNW.shape, p_BNW.dtype),
            jax.ShapeDtypeStruct((programs, 2 * roles + 1 + (shift is not None), width), jnp.float32),
        ],
        grid=(programs,),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        overwrite={7 + ROLES: 0},
        ROTATED=rotated,
        SHIFTED=shift is not None,
        **fields,
    )
    dgamma_RS, dbeta_RS, (dbias_S, *dmix_S) = jnp.split(sums.sum(0), [roles, 2 * roles])
    return (
        dp_BNW,
        dbias_S.astype(bias_S.dtype),
        dgamma_RS.astype(gamma_RS.dtype),
        dbeta_RS.astype(beta_RS.dtype),
        None,
        shift and (dmix_S[0].astype(shift[0].dtype), jnp.zeros_like(shift[1])),
    )


_queries_and_keys.defvjp(_forward, _backward)


def _sizes(
    p_BNW: Array, gamma_RS: Array, table: tuple[Array, Array] | None, tiles: RowTiles | RowSumTiles
) -> tuple[int, dict[str, Any]]:
    """Returns how many rows, tokens of the batch, p has, and the constants of both kernels."""
    roles, width = gamma_RS.shape
    rows, stride = p_BNW.size // p_BNW.shape[-1], p_BNW.shape[-1]
    block_h = power_of_two(cdiv(width, 2))
    table_rows = 0 if table is None else table[0].size // table[0].shape[-1]
    fields = {'ROLES': roles, 'ROWS': rows, 'TABLE_ROWS': table_rows, 'S': width, 'W': stride}
    return rows, fields | {'BLOCK_R': rows_of(tiles, block_h), 'BLOCK_H': block_h}
