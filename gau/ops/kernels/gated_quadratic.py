"""Quadratic attention with relu^2, its activations and its gate in one operation on a GPU.

    [u, v] = silu(p + bias)       o = u * (A v)

The products are those of `gau.ops.kernels.quadratic`; here is what lies around them, [N, E] and as large as the
projections. Forwards the compiler makes one pass before the products and one after them. Backwards it would make
several for each: the kernels here make one, which also writes the gradients of U and V where the next product reads
them. Kept are the projections, queries, keys, v and o.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch
from gau.ops.kernels.quadratic import Tokens, attend, attention_gradients, groups, no_gradient

# Tokens (a divisor of those of a group) and columns of a tile, and warps.
TILE = (16, 128, 4)
# As many groups as a kernel takes the results of; `groups` makes no more.
PIECES = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def gated_relu2_attention(
    p_BNW: Array, bias_2E: Array, q_BNS: Array, k_BNS: Array, bias_P: Array | None, tokens: Tokens, causal: bool
) -> Array:
    """Returns silu(u) * A silu(v) for [u, v] = p + bias, [B, N, E], with A of `relu2_attention`.

    Args:
      p_BNW: projections of gate and values in the first 2 E columns, in the type of q and k.
      bias_2E: bias of gate and values.
      q_BNS: and k_BNS, bias_P, tokens, causal: see `gau.ops.kernels.quadratic.relu2_attention`.
    """
    return _forward(p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, causal)[0]


def _forward(p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, causal):
    from gau.ops.kernels.gates_triton import LOWEST_GATE, SMALLEST_GATE

    width, dtype = bias_2E.shape[1], p_BNW.dtype
    bias_u, bias_v = bias_2E.astype(jnp.float32)
    v_NBE = jax.nn.silu(p_BNW[..., width : 2 * width].swapaxes(0, 1).astype(jnp.float32) + bias_v).astype(dtype)
    av_BNE = jnp.concatenate(attend(q_BNS, k_BNS, v_NBE, bias_P, tokens, causal), axis=1)
    u_BNE = p_BNW[..., :width].astype(jnp.float32) + bias_u
    # What `for_gate` does in the kernels: the backward pass divides by silu of it.
    u_BNE = jnp.where(jnp.abs(u_BNE) < SMALLEST_GATE.value, SMALLEST_GATE.value, u_BNE)
    u_BNE = jnp.where(u_BNE < LOWEST_GATE.value, LOWEST_GATE.value, u_BNE)
    o_BNE = (jax.nn.silu(u_BNE) * av_BNE.astype(jnp.float32)).astype(dtype)
    return o_BNE, (p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, v_NBE, o_BNE)


def _backward(causal, residuals, do_BNE):
    from gau.ops.kernels import gated_quadratic_triton as kernels

    p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, v_NBE, o_BNE = residuals
    like_v = jax.ShapeDtypeStruct(v_NBE.shape, v_NBE.dtype)
    half_dp, dbias_u, dav_NBE = _launch(
        kernels.gate_gradient_kernel, p_BNW, bias_2E, do_BNE, o_BNE, outputs=[like_v], overwrite=None, B=len(p_BNW)
    )
    dq_BNS, dk_BNS, dv, dbias_P = attention_gradients(q_BNS, k_BNS, v_NBE, dav_NBE, bias_P, tokens, causal)
    # A lone group may end in the middle of a tile.
    length = -(-next(groups(p_BNW.shape[1]))[1] // TILE[0]) * TILE[0]
    dp_BNW, dbias_v = _launch(
        *(kernels.value_gradient_kernel, p_BNW, bias_2E, half_dp, *dv, *dv[:1] * (PIECES - len(dv))),
        overwrite={2: 0},
        GROUPS=len(dv),
        LENGTH=length,
    )
    dbias_2E = jnp.stack([x.sum((0, 1)) for x in (dbias_u, dbias_v)]).astype(bias_2E.dtype)
    return dp_BNW, dbias_2E, dq_BNS, dk_BNS, dbias_P, no_gradient(tokens)


gated_relu2_attention.defvjp(_forward, _backward)


def _launch(kernel, p_BNW, bias_2E, *more, overwrite, outputs=(), **constants) -> list[Array]:
    """Runs a kernel over tiles of [N, E]; returns the gradients of p and, still to be summed, bias, and `outputs`."""
    batch, n, stride = p_BNW.shape
    width = bias_2E.shape[1]
    tokens, columns, num_warps = TILE
    down = -(-n // tokens)
    dp = jax.ShapeDtypeStruct(p_BNW.shape, p_BNW.dtype)
    return launch(
        kernel,
        p_BNW,
        bias_2E,
        *more,
        outputs=[dp, jax.ShapeDtypeStruct((batch, down, width), jnp.float32), *outputs],
        grid=(-(-width // columns), down, batch),
        num_warps=num_warps,
        num_stages=1,
        overwrite=overwrite,
        n=n,
        E=width,
        W=stride,
        BLOCK_N=tokens,
        BLOCK_E=columns,
        **constants,
    )
