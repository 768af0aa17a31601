"""Quadratic attention with relu^2, its activations and its gate in one operation on a GPU.

    [u, v] = silu(p + bias)       o = u * (A v)

The products are those of `gau.ops.kernels.quadratic`; here is what lies around them, [N, E] and as large as the
projections. A product takes whole arrays only, and each wants other tokens: the kernels write values, and gradients of
A v, straight into the pieces that the products read, and read the products' results in pieces as they are. Backwards
the activations are computed again; kept are the projections, queries, keys, and A v.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch
from gau.ops.kernels.quadratic import Tokens, attend, attention_gradients, groups, no_gradient

# Tokens (a divisor of those of a group) and columns of a tile, and warps.
TILE = (16, 128, 4)
# As many pieces as a kernel takes at once; `groups` makes no more.
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
    from gau.ops.kernels.gated_quadratic_triton import values_kernel

    values = _launch(values_kernel, p_BNW, bias_2E, before=True, after=not causal)
    av = attend(q_BNS, k_BNS, values, bias_P, tokens, causal)
    bias_E = bias_2E[0].astype(jnp.float32)
    gated = []
    for (begin, stop, _), av_BnE in zip(groups(p_BNW.shape[1]), av, strict=True):
        u_BnE = jax.nn.silu(p_BNW[:, begin:stop, : bias_E.size].astype(jnp.float32) + bias_E)
        gated.append((u_BnE * av_BnE.astype(jnp.float32)).astype(av_BnE.dtype))
    return jnp.concatenate(gated, axis=1), (p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, av)


def _backward(causal, residuals, do_BNE):
    from gau.ops.kernels import gated_quadratic_triton as kernels

    p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, av = residuals
    batch, n = p_BNW.shape[:2]
    width = bias_2E.shape[-1]
    dp = jax.ShapeDtypeStruct(p_BNW.shape, p_BNW.dtype)
    dbias = jax.ShapeDtypeStruct((batch, -(-n // TILE[0]), width), jnp.float32)
    half_dp, dbias_u, *dav = _launch(
        *(kernels.gate_gradient_kernel, p_BNW, bias_2E, do_BNE, *_padded(av)),
        outputs=(dp, dbias),
        before=not causal,
        after=True,
    )
    values = _launch(kernels.values_kernel, p_BNW, bias_2E, before=False, after=False)
    dq_BNS, dk_BNS, dv, dbias_P = attention_gradients(q_BNS, k_BNS, values, dav, bias_P, tokens, causal)
    dp_BNW, dbias_v = _launch(
        *(kernels.value_gradient_kernel, p_BNW, bias_2E, half_dp, *_padded(dv)),
        outputs=(dp, dbias),
        overwrite={2: 0},
    )
    dbias_2E = jnp.stack([x.sum((0, 1)) for x in (dbias_u, dbias_v)]).astype(bias_2E.dtype)
    return dp_BNW, dbias_2E, dq_BNS, dk_BNS, dbias_P, no_gradient(tokens)


gated_relu2_attention.defvjp(_forward, _backward)


def _padded(pieces: list[Array]) -> list[Array]:
    return pieces + pieces[:1] * (PIECES - len(pieces))


def _launch(kernel, p_BNW, bias_2E, *more, outputs=(), before=None, after=None, overwrite=None) -> list[Array]:
    """Runs a kernel over tiles of [N, E] and returns its `outputs` and then, if `before` and `after` are given, pieces.

    Those are for each group of blocks an array [B, rows, E] of its tokens and, if asked, of all before or after them.
    """
    batch, n, stride = p_BNW.shape
    width = bias_2E.shape[-1]
    tokens, columns, num_warps = TILE
    bounds = [(begin, stop) for begin, stop, _ in groups(n)]
    # A lone group may end in the middle of a tile.
    constants = {'n': n, 'E': width, 'W': stride, 'LENGTH': -(-bounds[0][1] // tokens) * tokens}
    if outputs:
        # Gradients come in a piece for each group.
        constants['GROUPS'] = len(bounds)
    pieces, repeat = [], 1
    if before is not None:
        if before and after:
            # What has all tokens is the same for all groups.
            bounds, repeat = bounds[:1], len(bounds)
        rows = [(n if after else stop) - (0 if before else begin) for begin, stop in bounds]
        pieces = [jax.ShapeDtypeStruct((batch, r, width), p_BNW.dtype) for r in rows]
        pieces += [jax.ShapeDtypeStruct((1,), p_BNW.dtype)] * (PIECES - len(pieces))
        constants |= {'COUNT': len(rows), 'BEFORE': before, 'AFTER': after}
    results = launch(
        kernel,
        p_BNW,
        bias_2E,
        *more,
        outputs=[*outputs, *pieces],
        grid=(-(-width // columns), -(-n // tokens), batch),
        num_warps=num_warps,
        num_stages=1,
        overwrite=overwrite,
        BLOCK_N=tokens,
        BLOCK_E=columns,
        **constants,
    )
    if not pieces:
        return results
    return results[: len(outputs)] + results[len(outputs) :][: len(bounds)] * repeat
