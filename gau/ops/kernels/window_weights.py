"""Weights of a window of two chunks on a GPU: a key stands in two windows, and is read, and its gradient made, once.

Keys lie in memory chunk by chunk, so that the windows of a sequence overlap: no copy of them is made. In the gradient a
kernel takes a key's queries from both chunks, where the library would make that of two copies, to be added up.
"""

import jax
from jax import Array

from gau.ops.kernels import quadratic_weights, tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.quadratic_weights import Tokens
from gau.ops.kernels.tile_sizes import cdiv, fit, power_of_two


@jax.custom_vjp
def weights_in_window(q_BGCS: Array, k_BGCS: Array, bias_P: Array | None, tokens: Tokens) -> Array:
    """Returns `whole_weights` of every chunk on the chunk before it and on itself, causal, [B, G, C, 2 C].

    Weights of the first chunk on the one before are some numbers, and their gradient must be zeros.

    Args:
      q_BGCS: queries, bfloat16 or float32 as k is.
      k_BGCS: keys.
      bias_P: bias of every distance in a window, float32 [4 C - 1], or None.
      tokens: factors and segment ids of the 2 C tokens of each of the B G windows; no gradient goes there.
    """
    return _forward(q_BGCS, k_BGCS, bias_P, tokens)[0]


def _forward(q_BGCS, k_BGCS, bias_P, tokens):
    q, k = (x.reshape(-1, *x.shape[2:]) for x in (q_BGCS, k_BGCS))
    a, residuals = quadratic_weights.weights_forward(q, k, bias_P, tokens, causal=True)
    return a.reshape(*q_BGCS.shape[:3], -1), (residuals, q_BGCS, k_BGCS)


def _backward(residuals, da_BGCM):
    from gau.ops.kernels.window_weights_triton import gradient_kernel

    residuals, q_BGCS, k_BGCS = residuals
    batch, groups, size, width = q_BGCS.shape
    da = da_BGCM.reshape(-1, *da_BGCM.shape[2:])
    ds, dbias_P, dtokens = quadratic_weights.scores_gradient(residuals, da, causal=True)
    tiles = fit(tile_sizes.WINDOW_GRADIENT[str(q_BGCS.dtype)], block_m=size)
    dq_BGCS, dk_BGCS = launch(
        gradient_kernel,
        *(q_BGCS, k_BGCS, ds),
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BGCS, k_BGCS)],
        grid=(2, cdiv(size, tiles.block_m), batch * groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        G=groups,
        C=size,
        S=width,
        PRECISION='ieee',
        BLOCK_M=tiles.block_m,
        BLOCK_K=tiles.block_k,
        BLOCK_S=power_of_two(width),
    )
    return dq_BGCS, dk_BGCS, dbias_P, dtokens


weights_in_window.defvjp(_forward, _backward)
