"""Quadratic attention on a GPU, a block of queries or keys at a time: memory grows with N, not with N^2.

The large matmuls are the library's: [n, m] weights times [m, E] values run at nearly the peak of the chip. The kernels
make the weights of a block from q.k without writing scores down, in the backward pass together with the gradient of the
scores (`gau.ops.kernels.quadratic_weights`).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.quadratic_weights import (
    Tokens,
    add_by_distance,
    no_gradient,
    tokens_of_sequences,
    weights,
    weights_and_gradient,
    with_log_sums,
)
from gau.ops.kernels.tile_sizes import cdiv
from gau.ops.masks import clear_padding
from gau.ops.scores import Scoring
from gau.ops.tracing import traced_once

# The queries (backwards: keys) whose weights exist at once are an eighth of the sequence, within these bounds. Blocks
# come in at most GROUPS groups that share a range of keys: of a causal square, 1 / (2 GROUPS) is computed for nothing.
GROUPS = 8
SMALLEST_BLOCK, LARGEST_BLOCK = 256, 1024


@traced_once('scoring', 'causal')
def quadratic_attention(
    q_BNS: Array,
    k_BNS: Array,
    v_BNE: Array,
    *,
    scoring: Scoring,
    causal: bool,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
) -> Array:
    """Returns what the reference `gau.ops.quadratic_attention.quadratic_attention` does, for relu2 and softmax."""
    q_BNS, k_BNS, v_BNE = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    tokens = tokens_of_sequences(segment_ids_BN, q_BNS, scoring=scoring, causal=causal)
    bias_P = None if bias_P is None else bias_P.astype(jnp.float32)
    return clear_padding(attention(q_BNS, k_BNS, v_BNE, bias_P, tokens, causal), segment_ids_BN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(q_BNS: Array, k_BNS: Array, v_BNE: Array, bias_P: Array | None, tokens: Tokens, causal: bool) -> Array:
    """Returns A v with the weights A of `gau.ops.kernels.quadratic_weights.whole_weights`, [B, N, E].

    Args:
      q_BNS: and k_BNS, bias_P, tokens, causal: see there.
      v_BNE: values, in the type of q and k.
    """
    return _forward(q_BNS, k_BNS, v_BNE, bias_P, tokens, causal)[0]


def _forward(q_BNS, k_BNS, v_BNE, bias_P, tokens, causal):
    tokens = with_log_sums(q_BNS, k_BNS, bias_P, tokens, causal=causal)
    o_BNE = jnp.concatenate(attend(q_BNS, k_BNS, v_BNE.swapaxes(0, 1), bias_P, tokens, causal), axis=1)
    return o_BNE, (q_BNS, k_BNS, v_BNE, bias_P, tokens, o_BNE if tokens.softmax else None)


def _backward(causal, residuals, do_BNE):
    q_BNS, k_BNS, v_BNE, bias_P, tokens, o_BNE = residuals
    v_NBE, do_NBE = v_BNE.swapaxes(0, 1), do_BNE.swapaxes(0, 1)
    delta_BN = None
    if tokens.softmax:
        delta_BN = jnp.sum(do_BNE.astype(jnp.float32) * o_BNE.astype(jnp.float32), -1)
    dq, dk, dv, dbias = attention_gradients(q_BNS, k_BNS, v_NBE, do_NBE, bias_P, tokens, delta_BN, causal)
    return dq, dk, jnp.concatenate(dv, axis=1), dbias, no_gradient(tokens)


attention.defvjp(_forward, _backward)


def attend(q_BNS: Array, k_BNS: Array, v_NBE: Array, bias_P: Array | None, tokens: Tokens, causal: bool) -> list[Array]:
    """Returns A v of `attention` in the pieces [B, n, E] of all `groups`.

    Args:
      q_BNS: and k_BNS, bias_P, causal: see there.
      tokens: those of `with_log_sums`.
      v_NBE: values, tokens first: those of a group's keys are then one piece of memory, which matmuls read in place.
    """

    def block(v_MBE, first, size):
        a = weights(q_BNS, k_BNS, bias_P, tokens, (first, 0), (size, v_MBE.shape[0]), causal=causal)
        return v_MBE, jnp.einsum('BNM,MBE->BNE', a, v_MBE)

    bounds = groups(q_BNS.shape[1])
    # Queries of a causal group see no key after its end.
    return [_over_blocks(block, v_NBE[: where[1]] if causal else v_NBE, *where)[1] for where in bounds]


def attention_gradients(
    q_BNS: Array,
    k_BNS: Array,
    v_NBE: Array,
    do_NBE: Array,
    bias_P: Array | None,
    tokens: Tokens,
    delta_BN: Array | None,
    causal: bool,
) -> tuple[Array, Array, list[Array], Array | None]:
    """Returns the gradients of q, k, of the values in the pieces of all `groups`, and of the bias.

    A block of keys at a time, so that dk and dv come whole; only dq, which is narrow, is summed over blocks, and what
    all groups add to it once at the end.

    Args:
      q_BNS: and k_BNS, bias_P, tokens, causal: see `attend`.
      v_NBE: values, tokens first as there.
      do_NBE: gradient of A v.
      delta_BN: of a softmax, that gradient times A v, summed over the columns: it is the sum of the weights times their
        gradients; float32. Else None.
    """
    dbias_P = None if bias_P is None else jnp.zeros_like(bias_P)
    dqs, dks, dvs, n = [], [], [], q_BNS.shape[1]
    for begin, stop, size in groups(n):
        # No key of a causal group is seen by queries before it.
        start = begin if causal else 0
        q_BnS, do_nBE = q_BNS[:, start:], do_NBE[start:]

        def block(sums, first, size, start=start, do_nBE=do_nBE, q_BnS=q_BnS):
            dq, dbias_P = sums
            k = jax.lax.dynamic_slice_in_dim(k_BNS, first, size, axis=1)
            v = jax.lax.dynamic_slice_in_dim(v_NBE, first, size, axis=0)
            da = jnp.einsum('NBE,MBE->BNM', do_nBE, v)
            where = q_BNS, k_BNS, bias_P, tokens, (start, first)
            a, ds, db = weights_and_gradient(*where, da, delta_BN, causal=causal, recompute=True)
            if dbias_P is not None:
                dbias_P = add_by_distance(dbias_P, db, da.shape[1], start - first)
            dq += jnp.einsum('BNM,BMS->BNS', ds, k, preferred_element_type=jnp.float32)
            dk = jnp.einsum('BNM,BNS->BMS', ds, q_BnS)
            return (dq, dbias_P), (dk, jnp.einsum('BNM,NBE->BME', a, do_nBE))

        dq_BnS = jnp.zeros(q_BnS.shape, jnp.float32)
        (dq_BnS, dbias_P), (dk, dv) = _over_blocks(block, (dq_BnS, dbias_P), begin, stop, size)
        dqs.append(jnp.pad(dq_BnS, ((0, 0), (start, 0), (0, 0))))
        dks.append(dk)
        dvs.append(dv)
    return sum(dqs).astype(q_BNS.dtype), jnp.concatenate(dks, axis=1), dvs, dbias_P


def groups(n: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first token, end, tokens of a block) of every group of blocks."""
    size = min(max(cdiv(n, 128 * GROUPS) * 128, SMALLEST_BLOCK), LARGEST_BLOCK)
    length = size * cdiv(n, size * GROUPS)
    for begin in range(0, n, length):
        yield begin, min(begin + length, n), size


def _over_blocks(block: Callable[..., Any], carry: Any, begin: int, stop: int, size: int) -> tuple[Any, Any]:
    """Runs block(carry, first, size) over [begin, stop) in a scan and joins results [B, size, ...] along the tokens."""
    full_blocks, results = (stop - begin) // size, []
    if full_blocks > 1:
        firsts = begin + size * jnp.arange(full_blocks)
        carry, stacked = jax.lax.scan(lambda carry, first: block(carry, first, size), carry, firsts)
        results.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1]), stacked))
        begin += full_blocks * size
    for first in range(begin, stop, size):
        carry, result = block(carry, first, min(size, stop - first))
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)
