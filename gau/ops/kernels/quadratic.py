"""Quadratic attention with relu^2 on a GPU, a block of queries or keys at a time: memory grows with N, not with N^2.

The large matmuls are the library's: [n, m] weights times [m, E] values run at nearly the peak of the chip. The kernels
make the weights of a block from q.k without writing scores down, in the backward pass together with the gradient of the
scores.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import WeightsTiles, cdiv, fit, power_of_two
from gau.ops.masks import clear_padding, document_length, visible_keys
from gau.ops.scores import Scoring
from gau.ops.tracing import choose, traced_once

# The queries (backwards: keys) whose weights exist at once are an eighth of the sequence, within these bounds. Blocks
# come in at most GROUPS groups that share a range of keys: of a causal square, 1 / (2 GROUPS) is computed for nothing.
GROUPS = 8
SMALLEST_BLOCK, LARGEST_BLOCK = 256, 1024


class Tokens(NamedTuple):
    """What is known of the tokens before any attention: the normaliser as two factors, and the documents.

    Attributes:
      score_scale_BN: factor on q.k of a query, before the bias; float32.
      weight_scale_BN: factor on a query's weights; float32.
      ids_BN: segment ids, int32; None for one document without padding.
    """

    score_scale_BN: Array
    weight_scale_BN: Array
    ids_BN: Array | None


def describe_tokens(
    ids_BN: Array | None,
    shape: tuple[int, int],
    *,
    scoring: Scoring,
    causal: bool,
    sequence_length: int | Array,
    width: int,
) -> Tokens:
    """Returns the normaliser of `scoring` as factors on q.k and on the weights.

    Args:
      ids_BN: segment ids, or None for one document without padding.
      shape: (B, N).
      scoring: attention function relu2 and its normaliser.
      causal: whether later keys are hidden.
      sequence_length: n for the normaliser 'paper', a number or an array [B, N].
      width: S.
    """
    ones_BN = jnp.ones(shape, jnp.float32)
    if scoring.normalizer in ('visible', 'su'):
        if ids_BN is None:
            visible_N = jnp.arange(1, shape[1] + 1) if causal else jnp.full(shape[1], shape[1])
            visible_BN = jnp.broadcast_to(visible_N, shape).astype(jnp.float32)
        else:
            visible_BN = jnp.maximum(visible_keys(ids_BN, causal=causal), 1).astype(jnp.float32)
    if scoring.normalizer == 'su':
        return Tokens(ones_BN * width**-0.5, 1 / visible_BN, ids_BN)
    if scoring.normalizer == 'visible':
        return Tokens(1 / visible_BN, ones_BN, ids_BN)
    n = choose(scoring.normalizer, {'fixed': scoring.length, 'paper': jnp.maximum(sequence_length, 1)})
    return Tokens(ones_BN / n, ones_BN, ids_BN)


def tokens_of_sequences(segment_ids_BN: Array | None, q_BNS: Array, *, scoring: Scoring, causal: bool) -> Tokens:
    """Returns `describe_tokens` where the sequences of q are attended to whole, not in chunks."""
    *shape, width = q_BNS.shape
    ids_BN = None if segment_ids_BN is None else jnp.broadcast_to(segment_ids_BN, shape)
    length = shape[1] if segment_ids_BN is None else document_length(segment_ids_BN)
    fields = {'scoring': scoring, 'causal': causal, 'sequence_length': length, 'width': width}
    return describe_tokens(ids_BN, tuple(shape), **fields)


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
    """Returns what the reference `gau.ops.quadratic_attention.quadratic_attention` does, for the function relu2."""
    q_BNS, k_BNS, v_BNE = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    tokens = tokens_of_sequences(segment_ids_BN, q_BNS, scoring=scoring, causal=causal)
    bias_P = None if bias_P is None else bias_P.astype(jnp.float32)
    return clear_padding(relu2_attention(q_BNS, k_BNS, v_BNE, bias_P, tokens, causal), segment_ids_BN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def relu2_attention(
    q_BNS: Array, k_BNS: Array, v_BNE: Array, bias_P: Array | None, tokens: Tokens, causal: bool
) -> Array:
    """Returns A v with A = relu(q.k * score_scale + bias)^2 * weight_scale where the key is seen, else 0; [B, N, E].

    Args:
      q_BNS: queries, bfloat16 or float32 as k and v are.
      k_BNS: keys.
      v_BNE: values.
      bias_P: bias of every distance k - q from -(N - 1) to N - 1, float32 [2 N - 1], or None.
      tokens: factors and segment ids; no gradient goes there.
      causal: whether later keys are hidden.
    """
    return _forward(q_BNS, k_BNS, v_BNE, bias_P, tokens, causal)[0]


def _forward(q_BNS, k_BNS, v_BNE, bias_P, tokens, causal):
    o_BNE = jnp.concatenate(attend(q_BNS, k_BNS, v_BNE.swapaxes(0, 1), bias_P, tokens, causal), axis=1)
    return o_BNE, (q_BNS, k_BNS, v_BNE, bias_P, tokens)


def _backward(causal, residuals, do_BNE):
    q_BNS, k_BNS, v_BNE, bias_P, tokens = residuals
    v_NBE, do_NBE = v_BNE.swapaxes(0, 1), do_BNE.swapaxes(0, 1)
    dq, dk, dv, dbias = attention_gradients(q_BNS, k_BNS, v_NBE, do_NBE, bias_P, tokens, causal)
    return dq, dk, jnp.concatenate(dv, axis=1), dbias, no_gradient(tokens)


relu2_attention.defvjp(_forward, _backward)


def attend(q_BNS: Array, k_BNS: Array, v_NBE: Array, bias_P: Array | None, tokens: Tokens, causal: bool) -> list[Array]:
    """Returns A v of `relu2_attention` in the pieces [B, n, E] of all `groups`.

    Args:
      q_BNS: and k_BNS, bias_P, tokens, causal: see there.
      v_NBE: values, tokens first: those of a group's keys are then one piece of memory, which matmuls read in place.
    """

    def block(v_MBE, first, size):
        a = _weights(q_BNS, k_BNS, bias_P, tokens, (first, 0), (size, v_MBE.shape[0]), causal=causal)
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
    causal: bool,
) -> tuple[Array, Array, list[Array], Array | None]:
    """Returns the gradients of q, k, of the values in the pieces of all `groups`, and of the bias.

    A block of keys at a time, so that dk and dv come whole; only dq, which is narrow, is summed over blocks.

    Args:
      q_BNS: and k_BNS, bias_P, tokens, causal: see `relu2_attention`.
      v_NBE: values, tokens first as in `attend`.
      do_NBE: gradient of A v.
    """
    dbias_P = None if bias_P is None else jnp.zeros_like(bias_P)
    dqs, dks, dvs, n = [], [], [], q_BNS.shape[1]
    dq_BnS = jnp.zeros(q_BNS.shape, jnp.float32)
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
            a, ds, db = _weights_and_gradient(*where, da, causal=causal, recompute=True)
            if dbias_P is not None:
                dbias_P = _add(dbias_P, db, da.shape[1], start - first)
            dq += jnp.einsum('BNM,BMS->BNS', ds, k, preferred_element_type=jnp.float32)
            dk = jnp.einsum('BNM,BNS->BMS', ds, q_BnS)
            return (dq, dbias_P), (dk, jnp.einsum('BNM,NBE->BME', a, do_nBE))

        (dq_BnS, dbias_P), (dk, dv) = _over_blocks(block, (dq_BnS, dbias_P), begin, stop, size)
        dks.append(dk)
        dvs.append(dv)
        if causal:
            # No later key is seen by the queries of this group.
            dqs.append(dq_BnS[:, : stop - begin].astype(q_BNS.dtype))
            dq_BnS = dq_BnS[:, stop - begin :]
    dq_BNS = jnp.concatenate(dqs, axis=1) if causal else dq_BnS.astype(q_BNS.dtype)
    return dq_BNS, jnp.concatenate(dks, axis=1), dvs, dbias_P


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def relu2_weights(q_BQS: Array, k_BNS: Array, bias_P: Array | None, tokens: Tokens, causal: bool) -> Array:
    """Returns A of `relu2_attention`, [B, Q, N] in the type of q: for short sequences, such as chunks.

    The queries are of the last Q of the N tokens; see there for the other arguments.
    """
    queries, n = q_BQS.shape[1], k_BNS.shape[1]
    return _weights(q_BQS, k_BNS, bias_P, tokens, (n - queries, 0), (queries, n), causal=causal)


def _weights_forward(q_BQS, k_BNS, bias_P, tokens, causal):
    return relu2_weights(q_BQS, k_BNS, bias_P, tokens, causal), (q_BQS, k_BNS, bias_P, tokens)


def _weights_backward(causal, residuals, da_BQN):
    q_BQS, k_BNS, bias_P, tokens = residuals
    first = k_BNS.shape[1] - q_BQS.shape[1]
    fields = {'causal': causal, 'recompute': False}
    _, ds_BQN, dbias_P = _weights_and_gradient(q_BQS, k_BNS, bias_P, tokens, (first, 0), da_BQN, **fields)
    if first and bias_P is not None:
        dbias_P = _add(jnp.zeros_like(bias_P), dbias_P, q_BQS.shape[1], first)
    dq_BQS, dk_BNS = jnp.einsum('BNM,BMS->BNS', ds_BQN, k_BNS), jnp.einsum('BNM,BNS->BMS', ds_BQN, q_BQS)
    return dq_BQS, dk_BNS, dbias_P, no_gradient(tokens)


relu2_weights.defvjp(_weights_forward, _weights_backward)


def no_gradient(tokens: Tokens) -> Tokens:
    """Returns zeros in the place of a gradient."""
    zeros = None if tokens.ids_BN is None else np.zeros(tokens.ids_BN.shape, jax.dtypes.float0)
    return Tokens(jnp.zeros_like(tokens.score_scale_BN), jnp.zeros_like(tokens.weight_scale_BN), zeros)


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


def _add(sums_P: Array, diagonals: Array, n: int, offset: int | Array) -> Array:
    """Adds diagonals[d + n - 1] to sums[d - offset + N - 1], for all d = j - i of a block of n rows."""
    at = (sums_P.shape[0] - 1) // 2 - (n - 1) - offset
    # Not an update of the sums themselves: of groups of one block the compiler adds all at once.
    return sums_P + jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(sums_P), diagonals, at, axis=0)


def _sum_diagonals(tile_sums: Array, height: int, n: int, m: int) -> Array:
    """Returns sums[d + n - 1] of all x[i, j] with j - i = d of an array x [n, m], without a scatter.

    Args:
      tile_sums: sums along the diagonals of the tiles of x, [tiles of n, tiles of m, 2 width]: of the distances j - i
        inside a tile from -width on.
      height: rows of a tile, at most its columns, `width`.
      n: rows of x.
      m: columns of x.
    """
    rows, half = tile_sums.shape[0], tile_sums.shape[2] // 2
    # Along a row of tiles, what is before the diagonal of one lies upon what is after that of the tile to its left.
    before, after = (x.reshape(rows, -1) for x in (tile_sums[..., :half], tile_sums[..., half:]))
    lines = jnp.pad(before, ((0, 0), (0, half))) + jnp.pad(after, ((0, 0), (half, 0)))
    # The rows, last first, are written one after the other with zeros between and read again in shorter rows.
    lines = jnp.pad(lines[::-1], ((0, 0), (0, rows * height)))
    width = lines.shape[1] - height
    first = half + (rows - 1) * height - (n - 1)
    return lines.reshape(-1)[: rows * width].reshape(rows, width).sum(0)[first : first + n + m - 1]


def _launch(
    kernel, tiles: WeightsTiles, q, k, bias_P, tokens: Tokens, firsts, shape, *more, causal, **fields
) -> list[Array]:
    """Runs a kernel on the block of `shape` (n, m) whose first query and first key are `firsts`."""
    firsts = jnp.stack([jnp.asarray(first, jnp.int32) for first in firsts])
    return launch(
        kernel,
        q,
        k,
        # A stand-in for what is None: the kernel does not read it.
        tokens.score_scale_BN if bias_P is None else bias_P,
        tokens.score_scale_BN,
        tokens.weight_scale_BN,
        firsts if tokens.ids_BN is None else tokens.ids_BN,
        firsts,
        *more,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        N=k.shape[1],
        Q=q.shape[1],
        S=q.shape[2],
        n=shape[0],
        m=shape[1],
        CAUSAL=causal,
        BIAS=bias_P is not None,
        DOCUMENTS=tokens.ids_BN is not None,
        PRECISION='ieee',
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_S=power_of_two(q.shape[2]),
        **fields,
    )


def _weights(q, k, bias_P, tokens, firsts, shape, *, causal) -> Array:
    """Returns the weights of a block of `shape` (n, m) from the first query and the first key of `firsts` on."""
    from gau.ops.kernels.quadratic_triton import weights_kernel

    (n, m), batch = shape, q.shape[0]
    a = jax.ShapeDtypeStruct((batch, n, m), q.dtype)
    tiles = fit(tile_sizes.WEIGHTS[str(q.dtype)], block_m=n, block_n=m)
    across, down = cdiv(m, tiles.block_n), cdiv(n, tiles.block_m)
    grid = min(across, cdiv(tiles.min_programs, down * batch)), down, batch
    return _launch(weights_kernel, tiles, q, k, bias_P, tokens, firsts, shape, outputs=[a], grid=grid, causal=causal)[0]


def _weights_and_gradient(q, k, bias_P, tokens, firsts, da, *, causal, recompute: bool) -> tuple[Array, ...]:
    """Returns the weights if `recompute`, the gradient of q.k, and that of the bias by j - i, summed over sequences."""
    from gau.ops.kernels.quadratic_triton import weights_gradient_kernel

    batch, n, m = da.shape
    # No more rows than columns.
    tiles = fit(tile_sizes.WEIGHTS_GRADIENT[str(q.dtype)], block_m=min(n, m), block_n=m)
    across, down = cdiv(m, tiles.block_n), cdiv(n, tiles.block_m)
    parts = min(batch, cdiv(tiles.min_programs, across * down))
    like, missing = jax.ShapeDtypeStruct(da.shape, q.dtype), jax.ShapeDtypeStruct((1,), jnp.float32)
    db = missing if bias_P is None else jax.ShapeDtypeStruct((parts, down, across, 2 * tiles.block_n), jnp.float32)
    fields = {
        'B': batch,
        'outputs': [like if recompute else missing, like, db],
        'grid': (across, down, parts),
        'causal': causal,
        'RECOMPUTE': recompute,
    }
    operands = q, k, bias_P, tokens, firsts, (n, m), da
    a, ds, db = _launch(weights_gradient_kernel, tiles, *operands, **fields)
    if bias_P is None:
        return a, ds, None
    # The compiler would make these sums again in the norm that gradients are clipped by, in a single block of threads.
    return a, ds, jax.lax.optimization_barrier(_sum_diagonals(db.sum(0), tiles.block_m, n, m))
