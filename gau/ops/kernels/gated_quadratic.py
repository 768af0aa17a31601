"""FLASH-Quad's attention with its activations and its gate on a GPU: the fast path of `gated_quadratic_attention`.

    [u, v] = silu(p + bias)       o = u * (A v)

The matmuls are those of `gau.ops.kernels.quadratic`. Here is what lies around them, [N, E] and as large as the
projections: one pass before the matmuls and one after them, each way. Kernels do it and not the compiler. Forwards the
compiler would lay values out as the projections are, where no range of tokens is one piece of memory, so that every
matmul would get a copy; backwards it would make several passes. Saved are the projections, queries, keys, v and o.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.gates import gate_gradients, launch_over_tiles, values
from gau.ops.kernels.quadratic import attend, attention_gradients, groups
from gau.ops.kernels.quadratic_weights import Tokens, no_gradient, tokens_of_sequences, with_log_sums
from gau.ops.kernels.tile_sizes import GATES, cdiv
from gau.ops.masks import clear_padding
from gau.ops.scores import Scoring
from gau.ops.tracing import traced_once

# As many groups as a kernel takes the results of; `groups` makes no more.
PIECES = 8


@traced_once('scoring', 'causal')
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
    """Returns what `gau.ops.quadratic_attention.gated_quadratic_attention`, the reference, does, relu2 or softmax."""
    q_BNS, k_BNS = clear_padding(q_BNS, segment_ids_BN), clear_padding(k_BNS, segment_ids_BN)
    tokens = tokens_of_sequences(segment_ids_BN, q_BNS, scoring=scoring, causal=causal)
    bias_P = None if bias_P is None else bias_P.astype(jnp.float32)
    return gated_attention(p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def gated_attention(
    p_BNW: Array, bias_2E: Array, q_BNS: Array, k_BNS: Array, bias_P: Array | None, tokens: Tokens, causal: bool
) -> Array:
    """Returns silu(u) * A silu(v) for [u, v] = p + bias, [B, N, E], with A of `attention`.

    Args:
      p_BNW: projections of gate and values in the first 2 E columns, in the type of q and k.
      bias_2E: bias of gate and values.
      q_BNS: and k_BNS, bias_P, tokens, causal: see `gau.ops.kernels.quadratic.attention`.
    """
    return _forward(p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, causal)[0]


def _forward(p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, causal):
    from gau.ops.kernels import gated_quadratic_triton as kernels

    batch, n, _ = p_BNW.shape
    v_NBE = values(p_BNW, bias_2E, tokens_first=True)
    tokens = with_log_sums(q_BNS, k_BNS, bias_P, tokens, causal=causal)
    av = attend(q_BNS, k_BNS, v_NBE, bias_P, tokens, causal)
    like_o = jax.ShapeDtypeStruct((batch, n, bias_2E.shape[1]), p_BNW.dtype)
    (o_BNE,) = launch_over_tiles(kernels.output_kernel, p_BNW, bias_2E, *_pieces(av), outputs=[like_o], **_grouping(n))
    return o_BNE, (p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, v_NBE, o_BNE)


def _backward(causal, residuals, do_BNE):
    from gau.ops.kernels import gated_quadratic_triton as kernels

    p_BNW, bias_2E, q_BNS, k_BNS, bias_P, tokens, v_NBE, o_BNE = residuals
    batch, n, _ = p_BNW.shape
    half_dp, dbias_u, dav_NBE, *sums = gate_gradients(
        p_BNW, bias_2E, do_BNE, o_BNE, tokens_first=True, row_sums=tokens.softmax
    )
    # The gradient of A v times A v is that of o times o.
    where = bias_P, tokens, sums[0] if tokens.softmax else None
    dq_BNS, dk_BNS, dv, dbias_P = attention_gradients(q_BNS, k_BNS, v_NBE, dav_NBE, *where, causal)
    outputs = [
        jax.ShapeDtypeStruct(p_BNW.shape, p_BNW.dtype),
        jax.ShapeDtypeStruct((batch * cdiv(n, GATES.span), bias_2E.shape[1]), jnp.float32),
    ]
    inputs, fields = (p_BNW, bias_2E, half_dp, *_pieces(dv)), {'overwrite': {2: 0}} | _grouping(n)
    dp_BNW, dbias_v = launch_over_tiles(kernels.value_gradient_kernel, *inputs, outputs=outputs, spans=True, **fields)
    dbias_2E = jnp.stack([dbias_u, dbias_v.sum(0)]).astype(bias_2E.dtype)
    return dp_BNW, dbias_2E, dq_BNS, dk_BNS, dbias_P, no_gradient(tokens)


gated_attention.defvjp(_forward, _backward)


def _pieces(pieces: list[Array]) -> list[Array]:
    """Returns as many pieces as a kernel takes: those that there are, and the first again."""
    return [*pieces, *pieces[:1] * (PIECES - len(pieces))]


def _grouping(n: int) -> dict[str, int]:
    """Returns the constants that say which piece a token is in."""
    bounds = list(groups(n))
    # A lone group may end in the middle of a tile.
    return {'GROUPS': len(bounds), 'LENGTH': cdiv(bounds[0][1], GATES.block_n) * GATES.block_n}
