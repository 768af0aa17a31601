"""Cross-attention: the queries of one sequence against all keys of another: A V with A = f(q k^T / n + b)."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding
from gau.ops.scores import Scoring, attention_weights
from gau.ops.tracing import traced_once


@traced_once('scoring', 'sequence_axis')
def cross_attention(
    q_BNS: Array,
    k_BMS: Array,
    v_BME: Array,
    *,
    scoring: Scoring,
    segment_ids_BM: Array | None = None,
    bias: Array | None = None,
    sequence_axis: str | None = None,
) -> Array:
    """Returns A V for one head; every query sees every key that is not padding, whatever the order.

    The weights [B, N, M] stand in memory at once: this is for sources of some thousand tokens at most.

    Args:
      q_BNS: queries.
      k_BMS: keys of the source.
      v_BME: values of the source.
      scoring: attention function and normaliser; n of 'paper' is the number of the row's keys.
      segment_ids_BM: 0 where the source is padding; None: nowhere. A row of padding alone gives zeros.
      bias: b, one number, or None.
      sequence_axis: mesh axis over whose devices the tokens of both sequences are spread in order, where this runs
        inside `jax.shard_map`; keys and values of all devices are gathered.

    Returns:
      [B, N, E] in the dtype of v.
    """
    k_BMS, v_BME = (clear_padding(x, segment_ids_BM) for x in (k_BMS, v_BME))
    if sequence_axis is not None:
        k_BMS, v_BME, segment_ids_BM = jax.tree.map(
            lambda x: jax.lax.all_gather(x, sequence_axis, axis=1, tiled=True), (k_BMS, v_BME, segment_ids_BM)
        )
    length, mask_B1M = k_BMS.shape[1], None
    if segment_ids_BM is not None:
        mask_B1M = (segment_ids_BM > 0)[:, None]
        length = jnp.sum(mask_B1M, axis=-1, keepdims=True)
    a_BNM = attention_weights(q_BNS, k_BMS, scoring=scoring, sequence_length=length, mask=mask_B1M, bias=bias)
    return a_BNM.astype(v_BME.dtype) @ v_BME
