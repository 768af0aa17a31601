"""Quadratic attention: every query against every key it sees. GAU's A V (docs/paper.md section 1) and softmax."""

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.masks import clear_padding, document_length, visibility_mask
from gau.ops.positions import bias_matrix
from gau.ops.scores import Scoring
from gau.ops.tracing import choose, traced_once

# Queries of a block where a sequence is longer than two of them, and the most scores of all rows and heads that exist
# at once: 0.5 GiB in float32. One head keeps all scores of 131,072 tokens in sequences of 1,024.
QUERY_BLOCK = 512
MAX_SCORES = 2**27


@traced_once('scoring', 'causal', 'impl', 'heads', 'sequence_axis')
def quadratic_attention(
    q_BNS: Array,
    k_BNS: Array,
    v_BNE: Array,
    *,
    scoring: Scoring,
    causal: bool,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
    impl: str = 'xla',
    heads: int = 1,
    sequence_axis: str | None = None,
) -> Array:
    """Returns A V for one head, A = f(q k^T / n + b) over the visible keys.

    Args:
      q_BNS: queries.
      k_BNS: keys.
      v_BNE: values.
      scoring: attention function and normaliser.
      causal: whether keys after the query are hidden.
      segment_ids_BN: documents and padding, or None.
      bias_P: relative position bias by distance k - q, [2 N - 1] (`gau.ops.positions`), or None.
      impl: 'reference' holds the [B, N, N] matrix at once; 'xla' computes it a block of queries at a time and again in
        the backward pass, so that memory grows with N and not with its square. Short sequences are one block, which is
        kept for the backward pass, unless rows and heads make it too large (`MAX_SCORES`).
      heads: how many heads are computed together where this runs inside `jax.vmap`, at most.
      sequence_axis: mesh axis over whose devices the tokens are spread in order, where this runs inside
        `jax.shard_map`; N is then the tokens of one device, but for `bias_P`. Keys and values of all devices are
        gathered.

    Returns:
      [B, N, E] in the dtype of v; zeros at padding.

    Raises:
      ValueError: an unknown `impl`.
    """
    n = q_BNS.shape[1]
    q_BNS, k_BMS, v_BME = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    ids_BM, offset = segment_ids_BN, 0
    if sequence_axis is not None:
        k_BMS, v_BME, ids_BM = jax.tree.map(
            lambda x: jax.lax.all_gather(x, sequence_axis, axis=1, tiled=True), (k_BMS, v_BME, ids_BM)
        )
        offset = n * jax.lax.axis_index(sequence_axis)
    m, dtype = k_BMS.shape[1], jnp.promote_types(q_BNS.dtype, jnp.float32)
    if segment_ids_BN is None:
        length_BN1 = jnp.full((1, n, 1), m, jnp.int32)
    else:
        length_BN1 = document_length(segment_ids_BN, ids_BM)[..., None]

    def attend(q_BnS, ids_Bn, length_Bn1, first):
        """A V with A = f(q k^T / n + b), of these queries with all keys."""
        _, rows, width = q_BnS.shape
        mask_BnM = visibility_mask(ids_Bn, ids_BM, n=rows, m=m, causal=causal, first_query=offset + first)
        s_BnM = jnp.einsum('BNS,BMS->BNM', q_BnS, k_BMS, preferred_element_type=dtype)
        b_nM = 0.0 if bias_P is None else bias_matrix(bias_P, rows, m, first=offset + first).astype(dtype)
        x_BnM = scoring.normalise(s_BnM, width=width, sequence_length=length_Bn1, mask=mask_BnM) + b_nM
        a_BnM = scoring.activate(x_BnM, mask_BnM)
        return a_BnM.astype(v_BME.dtype) @ v_BME

    block = choose(impl, {'reference': n, 'xla': _queries_per_block(n, keys=q_BNS.shape[0] * heads * m)})
    if block == n:
        o_BNE = attend(q_BNS, segment_ids_BN, length_BN1, 0)
    else:
        o_BNE = _by_query_blocks(attend, block, q_BNS, segment_ids_BN, length_BN1)
    return clear_padding(o_BNE, segment_ids_BN)


def gated_quadratic_attention(
    p_BNW: Array,
    bias_2E: Array,
    q_BNS: Array,
    k_BNS: Array,
    *,
    scoring: Scoring,
    causal: bool,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
) -> Array:
    """Returns silu(u) * quadratic_attention(q, k, silu(v)) for [u, v] = p + bias, one head; the kernels' reference.

    Args:
      p_BNW: projections of the gate in the first E columns, of the values in the next E; finite at padding. Columns
        after these, of another reader, get a gradient of zeros.
      bias_2E: bias of gate and values.
      q_BNS: and k_BNS, scoring, causal, segment_ids_BN, bias_P: see `quadratic_attention`.

    Returns:
      [B, N, E] in the dtype of p; zeros at padding.
    """
    u_BNE, v_BNE = gate_and_values(p_BNW, bias_2E)
    fields = {'scoring': scoring, 'causal': causal, 'segment_ids_BN': segment_ids_BN, 'bias_P': bias_P}
    return u_BNE * quadratic_attention(q_BNS, k_BNS, v_BNE, impl='reference', **fields)


def gate_and_values(p_BNW: Array, bias_2E: Array) -> tuple[Array, Array]:
    """Returns silu(u) and silu(v) for [u, v] = p + bias of the first 2 E columns, [B, N, E] each in the dtype of p."""
    uv_BN2E = p_BNW[..., : bias_2E.size].reshape(*p_BNW.shape[:2], *bias_2E.shape)
    u_BNE, v_BNE = jnp.moveaxis(jax.nn.silu(uv_BN2E + bias_2E.astype(p_BNW.dtype)), 2, 0)
    return u_BNE, v_BNE


def _queries_per_block(n: int, *, keys: int) -> int:
    """Returns how many of n queries have their scores with the keys of all rows and heads computed at once."""
    block = n if n <= 2 * QUERY_BLOCK else QUERY_BLOCK
    while block > 1 and block * keys > MAX_SCORES:
        block = -(-block // 2)
    return block


def _by_query_blocks(attend, block, q_BNS, segment_ids_BN, length_BN1):
    """Runs `attend` over blocks of so many queries in a scan; what one computes is recomputed in the backward pass."""
    n = q_BNS.shape[1]
    blocks = -(-n // block)

    def split(x, axis):
        if x is None:
            return None
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * block - n)
        x = jnp.pad(x, padding)
        x = x.reshape((*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]))
        return jnp.moveaxis(x, axis, 0)

    def body(_, xs):
        return None, attend(*xs)

    xs = (
        split(q_BNS, 1),
        split(segment_ids_BN, 1),
        split(length_BN1, 1),
        jnp.arange(blocks) * block,
    )
    o_gBnE = jax.lax.scan(jax.checkpoint(body), None, xs)[1]
    return jnp.moveaxis(o_gBnE, 0, 1).reshape(q_BNS.shape[0], blocks * block, -1)[:, :n]
