"""FLASH's attention with its activations and its gate in one operation (docs/paper.md section 3).

    [u, v] = silu([U, V])      o[g] = u[g] * (A[g] v[g] + Q[g] M[g])

U and V are projections before their bias and silu, A the attention weights inside chunk g, M[g] the mean or the sum of
k v^T over the tokens outside it that its queries may see. What is [N, E] is read and written as little as possible, and
the backward pass keeps by hand what it needs: the projections, A, Q and K, the states M, v and o. (Of a text of two
chunks kernels make no states: `gau.ops.kernels.chunk_pairs`.)

`gated_mixed_chunk` is the layer's view of it, `gated_chunk_product` the operation with its own gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.chunk_states import first_and_last_document, into_chunks
from gau.ops.kernels.gated_chunks import gradients, product_and_states
from gau.ops.kernels.quadratic import describe_tokens, relu2_weights
from gau.ops.masks import visibility_mask
from gau.ops.mixed_chunk_attention import mixed_chunk_attention
from gau.ops.positions import bias_matrix
from gau.ops.quadratic_attention import gate_and_values
from gau.ops.scores import Scoring, attention_weights
from gau.ops.tracing import traced_once


@traced_once('chunk_size', 'scoring', 'causal', 'global_reduction', 'impl')
def gated_mixed_chunk(
    p_BNW: Array,
    bias_2E: Array,
    q_BNS: Array,
    k_BNS: Array,
    q_lin_BNS: Array,
    k_lin_BNS: Array,
    *,
    chunk_size: int,
    scoring: Scoring,
    causal: bool,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
    global_reduction: str = 'mean',
    impl: str = 'triton',
) -> Array:
    """Returns silu(u) * mixed_chunk_attention(..., silu(v)) for [u, v] = p + bias, both branches, one head.

    Args:
      p_BNW: projections of the gate in the first E columns, of the values in the next E; finite at padding. Columns
        after these, of another reader, get a gradient of zeros.
      bias_2E: bias of gate and values.
      q_BNS: and k_BNS, q_lin_BNS, k_lin_BNS: see `gau.ops.mixed_chunk_attention`. At padding these, p
        and the result's gradient are finite and not too large for products of them: what they make there is masked.
      chunk_size: and scoring, causal, segment_ids_BN, global_reduction: see there.
      bias_P: relative bias by distance inside a chunk, [2 min(N, C) - 1], or None.
      impl: 'reference' is that function between plain silu and product; 'triton' the fused kernels.

    Returns:
      [B, N, E] in the dtype of p; zeros at padding.
    """
    batch, n = p_BNW.shape[:2]
    size = min(chunk_size, n)
    if impl == 'reference':
        u_BNE, v_BNE = gate_and_values(p_BNW, bias_2E)
        return u_BNE * mixed_chunk_attention(
            q_BNS,
            k_BNS,
            q_lin_BNS,
            k_lin_BNS,
            v_BNE,
            chunk_size=chunk_size,
            scoring=scoring,
            causal=causal,
            segment_ids_BN=segment_ids_BN,
            bias_CC=None if bias_P is None else bias_matrix(bias_P, size, size),
            global_reduction=global_reduction,
            impl='reference',
        )
    dtype = p_BNW.dtype
    q, k, q_lin, k_lin = (into_chunks(x, size) for x in (q_BNS, k_BNS, q_lin_BNS, k_lin_BNS))
    # The zeros that fill the last chunk have no documents; without documents the text is one.
    ids_BGC = into_chunks(jnp.ones((1, n), jnp.int32) if segment_ids_BN is None else segment_ids_BN, size)
    # The weights have no need to compare documents where there is one and no zeros fill the last chunk.
    seen = None if segment_ids_BN is None and n % size == 0 else ids_BGC
    a_BGCC = _weights_in_chunks(q, k, bias_P, seen, chunk_size=chunk_size, scoring=scoring, causal=causal)
    reading, adding, keep_BGP, share_BGP, scale_BGC = _walks(ids_BGC, causal=causal, mean=global_reduction == 'mean')
    if not causal:
        q_lin = q_lin.astype(scale_BGC.dtype) * scale_BGC[..., None]
        in_chunk = jnp.einsum(
            'BGCS,BGKS->BGCK', q_lin.astype(dtype), k_lin.astype(dtype), preferred_element_type=scale_BGC.dtype
        )
        same_BGCC = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=False)
        a_BGCC = a_BGCC + jnp.where(same_BGCC, in_chunk, 0).astype(dtype)
    if segment_ids_BN is None:
        # All read, the first chunk a state of zeros, and all are added, those that fill the last chunk as zeros.
        q_BGCF, k_BGCF = (jnp.concatenate([x] * len(reading), axis=-1) for x in (q_lin, k_lin))
    else:
        q_BGCF = jnp.concatenate([jnp.where(sees_BGC[..., None], q_lin, 0) for sees_BGC in reading], axis=-1)
        k_BGCF = jnp.concatenate([jnp.where(adds_BGC[..., None], k_lin, 0) for adds_BGC in adding], axis=-1)
    o_BGCE = gated_chunk_product(
        into_chunks(p_BNW, size),
        bias_2E,
        a_BGCC,
        q_BGCF.astype(dtype),
        k_BGCF.astype(dtype),
        *(jnp.broadcast_to(x_BGP, (batch, *x_BGP.shape[1:])) for x_BGP in (keep_BGP, share_BGP)),
        causal,
    )
    return o_BGCE.reshape(batch, -1, o_BGCE.shape[-1])[:, :n]


def _weights_in_chunks(q_BGCS, k_BGCS, bias_P, ids_BGC, *, chunk_size, scoring, causal) -> Array:
    """Returns the attention weights inside chunks, [B, G, C, C] in the type of q."""
    shape, size = q_BGCS.shape[:3], q_BGCS.shape[2]
    if scoring.function == 'relu2':
        ids = None if ids_BGC is None else jnp.broadcast_to(ids_BGC, shape).reshape(-1, size)
        fields = {'scoring': scoring, 'causal': causal, 'sequence_length': chunk_size, 'width': q_BGCS.shape[-1]}
        q, k = (x.reshape(-1, *x.shape[2:]) for x in (q_BGCS, k_BGCS))
        bias_P = None if bias_P is None else bias_P.astype(jnp.float32)
        return relu2_weights(q, k, bias_P, describe_tokens(ids, q.shape[:2], **fields), causal).reshape(*shape, size)
    mask = visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=causal)
    bias = None if bias_P is None else bias_matrix(bias_P, size, size)
    a = attention_weights(q_BGCS, k_BGCS, scoring=scoring, sequence_length=chunk_size, mask=mask, bias=bias)
    return a.astype(q_BGCS.dtype)


def _walks(ids_BGC: Array, *, causal: bool, mean: bool) -> tuple[list[Array], list[Array], Array, Array, Array | None]:
    """How states walk over the chunks, forwards and, unless causal, backwards too.

    A walk carries the state of the document that is open where it stands. It adds to it the tokens of a chunk that
    belong to the document it leaves the chunk with; if that is another one, it first drops what it carried.

    Returns:
      For each walk, the tokens that read what it carries [B, G, C] and those that it adds; whether it keeps what it
      carried, float32 [B, G, P]; and what makes means of sums over the tokens that a query sees globally. If causal,
      all queries of a chunk see the same ones: a factor on the state that they read, [B, G, P]. Else these are 1, and
      there is a factor on every query, [B, G, C].
    """
    first_BG, last_BG = first_and_last_document(ids_BGC)
    reading, adding, keep, share, counts_BGC = [], [], [], [], []
    for reverse in (False,) if causal else (False, True):
        flip = (lambda x: x[:, ::-1]) if reverse else (lambda x: x)
        leaves_BG = flip(first_BG if reverse else last_BG)
        adds_BGC = (flip(ids_BGC) == leaves_BG[..., None]) & (flip(ids_BGC) > 0)
        # The document of the last chunk so far that was not all padding.
        groups = jnp.arange(leaves_BG.shape[1])
        latest_BG = jax.lax.cummax(jnp.where(leaves_BG > 0, groups, -1), axis=1)
        after_BG = jnp.where(latest_BG < 0, 0, jnp.take_along_axis(leaves_BG, jnp.maximum(latest_BG, 0), axis=1))
        open_BG = jnp.pad(after_BG, ((0, 0), (1, 0)))[:, :-1]
        keep_BG = ((after_BG == open_BG) & (open_BG > 0)).astype(jnp.float32)
        counts = keep_BG, adds_BGC.sum(-1).astype(jnp.float32)
        total_BG = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1]), counts, axis=1)[1]
        carried_BG = jnp.pad(total_BG, ((0, 0), (1, 0)))[:, :-1]
        reads_BGC = (flip(ids_BGC) == open_BG[..., None]) & (flip(ids_BGC) > 0)
        share.append(flip(1 / jnp.maximum(carried_BG, 1) if causal and mean else jnp.ones_like(carried_BG)))
        counts_BGC.append(flip(reads_BGC * carried_BG[..., None]))
        reading.append(flip(reads_BGC))
        adding.append(flip(adds_BGC))
        keep.append(flip(keep_BG))
    scale_BGC = None
    if not causal:
        size = ids_BGC.shape[-1]
        count_BGC = sum(counts_BGC) + visibility_mask(ids_BGC, ids_BGC, n=size, m=size, causal=False).sum(-1)
        scale_BGC = jnp.where(count_BGC > 0, 1 / jnp.maximum(count_BGC, 1) if mean else 1.0, 0.0)
    return reading, adding, jnp.stack(keep, axis=-1), jnp.stack(share, axis=-1), scale_BGC


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def gated_chunk_product(
    p_BGCW: Array,
    bias_2E: Array,
    a_BGCC: Array,
    q_BGCF: Array,
    k_BGCF: Array,
    keep_BGP: Array,
    share_BGP: Array,
    causal: bool,
) -> Array:
    """Returns silu(u) * (a silu(v) + q share m) for [u, v] = p + bias, [B, G, C, E], with m the states of P walks.

    The first walk goes forwards: m[0] = 0, m[g + 1] = keep[g] m[g] + k[g]^T silu(v[g]); a second one goes backwards.
    Their m [S, E] stand one below the other, so that q and k are as wide as the walks together, F = P S.

    Args:
      p_BGCW: projections of gate and values in the first 2 E columns.
      bias_2E: their bias, float32.
      a_BGCC: weights inside chunks; zero above the diagonal if `causal`.
      q_BGCF: what reads the states; zero for what a token may not see.
      k_BGCF: what writes them.
      keep_BGP: 1 where a walk carries its state on over a chunk, 0 where it drops it; float32, no gradient.
      share_BGP: factor on the state that a chunk reads; float32, not 0, no gradient.
      causal: lets tiles above the diagonal be left out.
    """
    return product_and_states(p_BGCW, bias_2E, a_BGCC, q_BGCF, k_BGCF, keep_BGP, share_BGP, causal=causal)[0]


def _forward(*args):
    o_BGCE, *kept = product_and_states(*args[:-1], causal=args[-1])
    return o_BGCE, (*args[:-1], o_BGCE, *kept)


def _backward(causal, residuals, do_BGCE):
    return gradients(*residuals, do_BGCE, causal=causal)


gated_chunk_product.defvjp(_forward, _backward)
