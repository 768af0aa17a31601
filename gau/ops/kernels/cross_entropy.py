"""The vocabulary loss of a slice of logits and its gradient, in one pass over them."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.cross_entropy import REFERENCE, SliceLoss
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import loss_tiles
from gau.ops.tracing import choose

# A row stands in the registers of one program: 64 numbers for each thread of 32 warps.
LARGEST_VOCABULARY = 65_536
# The length of a row of logits is a multiple of this. Rows of other lengths XLA copies for each matmul with them, into
# rows that fit the matrix units, and the results back: 10 ms of a step of 65,536 tokens and 32,102 words (LOG.md, L21).
COLUMNS = 128


def loss_and_gradient(
    logits_BNW: Array, targets_BN: Array, weights_BN: Array, *, vocab_size: int, dtype
) -> tuple[Array, Array]:
    """Returns -log softmax(logits)[target], float32 [B, N], and weights (softmax - onehot) in `dtype`, [B, N, W].

    Args:
      logits_BNW: float32 or float16; what stands in the columns after the first `vocab_size` is not used, and its
        gradient is zero.
      targets_BN: integers in [0, vocab_size).
      weights_BN: float32.
      vocab_size: V, up to LARGEST_VOCABULARY.
      dtype: of the gradient.
    """
    from gau.ops.kernels.cross_entropy_triton import cross_entropy_kernel

    columns = logits_BNW.shape[-1]
    tiles = loss_tiles(columns)
    nll_BN, dlogits_BNW = launch(
        cross_entropy_kernel,
        logits_BNW,
        targets_BN.astype(jnp.int32),
        weights_BN.astype(jnp.float32),
        outputs=[
            jax.ShapeDtypeStruct(targets_BN.shape, jnp.float32),
            jax.ShapeDtypeStruct(logits_BNW.shape, dtype),
        ],
        grid=(targets_BN.size,),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        V=vocab_size,
        COLUMNS=columns,
        BLOCK_V=tiles.block_v,
    )
    return nll_BN, dlogits_BNW


FUSED = SliceLoss(loss_and_gradient, COLUMNS, half_precision=True)


def slice_loss(impl: str, vocab_size: int) -> SliceLoss:
    """Returns how slices of logits are scored: 'triton' with the kernel, where the vocabulary fits, 'xla' without."""
    fits = vocab_size <= LARGEST_VOCABULARY
    return choose(impl, {'xla': REFERENCE, 'triton': FUSED if fits else REFERENCE})
