"""The vocabulary loss of a slice of logits and its gradient, in one pass over them."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two

# A row stands in the registers of one program: 64 numbers for each thread of 32 warps.
LARGEST_VOCABULARY = 65_536


def loss_and_gradient(logits_BNV: Array, targets_BN: Array, weights_BN: Array, *, dtype) -> tuple[Array, Array]:
    """Returns -log softmax(logits)[target], float32 [B, N], and weights (softmax - onehot) in `dtype`, [B, N, V].

    Args:
      logits_BNV: float32 or float16, V up to LARGEST_VOCABULARY.
      targets_BN: integers in [0, V).
      weights_BN: float32.
      dtype: of the gradient.
    """
    from gau.ops.kernels.cross_entropy_triton import cross_entropy_kernel

    block_v = power_of_two(logits_BNV.shape[-1])
    nll_BN, dlogits_BNV = launch(
        cross_entropy_kernel,
        logits_BNV,
        targets_BN.astype(jnp.int32),
        weights_BN.astype(jnp.float32),
        outputs=[
            jax.ShapeDtypeStruct(targets_BN.shape, jnp.float32),
            jax.ShapeDtypeStruct(logits_BNV.shape, dtype),
        ],
        grid=(targets_BN.size,),
        num_warps=max(4, min(32, block_v // 1024)),
        num_stages=1,
        V=logits_BNV.shape[-1],
        BLOCK_V=block_v,
    )
    return nll_BN, dlogits_BNV
