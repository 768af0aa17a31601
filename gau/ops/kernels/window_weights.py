"""Weights of a window of two chunks on a GPU, with a gradient that reads and writes every key once.

The kernels of the weights take keys chunk by chunk, so that each stands in two chunks' windows. Of the gradient of q.k
the library would make that of both copies, and a third pass would add them up; here a kernel takes a key's queries
from both chunks.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.gated_states import previous_chunk
from gau.ops.kernels import quadratic_weights, tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.quadratic_weights import Tokens
from gau.ops.kernels.tile_sizes import cdiv, fit, power_of_two


@jax.custom_vjp
def weights_in_window(q_BGCS: Array, k_BGCS: Array, bias_P: Array | None, tokens: Tokens) -> Array:
    """Returns `whole_weights` of every chunk on the chunk before it and on itself, causal, [B, G, C, 2 C].

    Those of the first chunk on the one before are as if its keys were zeros; the gradient takes theirs to be zeros.

    Args:
      q_BGCS: queries, bfloat16 or float32 as k is.
      k_BGCS: keys.
      bias_P: bias of every distance in a window, float32 [4 C - 1], or None.
      tokens: factors and segment ids of the 2 C tokens of each of the B G windows; no gradient goes there.
    """
    return _forward(q_BGCS, k_BGCS, bias_P, tokens)[0]


def _forward(q_BGCS, k_BGCS, bias_P, tokens):
    k_BGMS = jnp.concatenate([previous_chunk(k_BGCS), k_BGCS], axis=2)
    q, k = (x.reshape(-1, *x.shape[2:]) for x in (q_BGCS, k_BGMS))
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
