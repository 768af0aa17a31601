"""Softmax attention by JAX's own Pallas kernels for TPUs (splash attention): N x N scores exist in the chip only.

What is ours here is the fitting: lengths that its blocks do not divide, documents, padding, and queries of which a
device has a part. Blocks of keys that no query of a block sees are passed over; those of other documents are not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding
from gau.ops.tracing import traced_once

# Tokens of a block must be a multiple of this, and are the largest of BLOCKS that divides the padded sequence.
LANES = 128
BLOCKS = (512, 256, 128)


@traced_once('causal', 'sequence_axis', 'interpret')
def splash_attention(
    q_BHNK: Array,
    k_BHNK: Array,
    v_BHNK: Array,
    *,
    causal: bool,
    segment_ids_BN: Array | None = None,
    sequence_axis: str | None = None,
    interpret: bool = False,
) -> Array:
    """Returns softmax(q k^T / sqrt(K)) v over the visible keys of every head.

    Args:
      q_BHNK: queries, bfloat16 or float32.
      k_BHNK: keys.
      v_BHNK: values.
      causal: whether keys after the query are hidden.
      segment_ids_BN: documents and padding, or None.
      sequence_axis: mesh axis over whose devices the tokens are spread in order, where this runs inside
        `jax.shard_map`. Keys and values of all devices are gathered.
      interpret: whether Pallas interprets the kernels, which any device can (slowly; for tests).

    Returns:
      [B, H, N, K] in the dtype of v; zeros at padding.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    n, width = q_BHNK.shape[2:]
    if segment_ids_BN is not None:
        q_BHNK, k_BHNK, v_BHNK = (clear_padding(x, segment_ids_BN, token_axis=2) for x in (q_BHNK, k_BHNK, v_BHNK))
    ids_BN = segment_ids_BN
    # What is put after the last token no causal query sees; without causality it must be padding.
    missing = -n % LANES
    if missing and ids_BN is None and (not causal or sequence_axis is not None):
        ids_BN = jnp.ones((q_BHNK.shape[0], n), jnp.int32)
    q_BHNK, k_BHMK, v_BHMK = (jnp.pad(x, [(0, 0)] * 2 + [(0, missing), (0, 0)]) for x in (q_BHNK, k_BHNK, v_BHNK))
    ids_BN = None if ids_BN is None else jnp.pad(ids_BN, [(0, 0), (0, missing)])
    ids_BM, shards = ids_BN, 1
    if sequence_axis is not None:
        gather = functools.partial(jax.lax.all_gather, axis_name=sequence_axis, tiled=True)
        k_BHMK, v_BHMK = (gather(x, axis=2) for x in (k_BHMK, v_BHMK))
        ids_BM = None if ids_BN is None else gather(ids_BN, axis=1)
        shards = k_BHMK.shape[2] // q_BHNK.shape[2]
    kernel = _kernel(q_BHNK.shape[1], q_BHNK.shape[2], shards, causal=causal, interpret=interpret)
    if causal and shards > 1:
        kernel = _of_shard(kernel, jax.lax.axis_index(sequence_axis), shards)
    q_BHNK = (q_BHNK * width**-0.5).astype(q_BHNK.dtype)
    if ids_BN is None:
        o_BHNK = jax.vmap(kernel)(q_BHNK, k_BHMK, v_BHMK)
    else:
        o_BHNK = jax.vmap(kernel)(q_BHNK, k_BHMK, v_BHMK, SegmentIds(ids_BN, ids_BM))
    return clear_padding(o_BHNK[:, :, :n].astype(v_BHNK.dtype), segment_ids_BN, token_axis=2)


def _kernel(heads: int, n: int, shards: int, *, causal: bool, interpret: bool) -> Any:
    """Returns the kernel of one sequence, with the plan of its blocks: if causal, that of all shards."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = next(size for size in BLOCKS if n % size == 0)
    blocks = splash.BlockSizes(size, size, None, size, size, None, size, size)
    # Without causality every shard has the same plan.
    mask = masks.CausalMask((shards * n, shards * n)) if causal else masks.FullMask((n, shards * n))
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=shards if causal else 1,
        interpret=interpret,
    )


def _of_shard(kernel: Any, shard: Array, shards: int) -> Any:
    """Returns the kernel with the part of its plan that one shard of the queries has."""

    def part(info):
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(  # noqa: E731
            x, shard * (x.shape[axis] // shards), x.shape[axis] // shards, axis
        )
        along = {'data_next': 1, 'mask_next': 1, 'block_mask': 1, 'q_sequence': 0}
        return info._replace(
            **{name: cut(getattr(info, name), axis) for name, axis in along.items() if getattr(info, name) is not None}
        )

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*map(part, infos), **kernel.kwargs)
