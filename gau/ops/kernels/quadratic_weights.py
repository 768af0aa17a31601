"""Weights of quadratic attention on a GPU: what kernels know of the tokens, a block of weights, and its gradient.

The functions are relu^2 and the two softmaxes. A row of softmax is divided by its sum: a pass over q.k finds the log of
each query's sum, with a running maximum, a tile of keys at a time, and with it weights are made as relu^2's are, any
block of them alone.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gau.ops.kernels import tile_sizes
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import WeightsTiles, cdiv, fit, power_of_two
from gau.ops.masks import document_length, visible_keys
from gau.ops.scores import SOFTMAX_PLUS_KEYS, SOFTMAXES, Scoring
from gau.ops.tracing import choose

# The attention functions that the kernels have.
FUNCTIONS = ('relu2', *SOFTMAXES)


class Tokens(NamedTuple):
    """What kernels know of the tokens: how scores and weights are normalised, and the documents.

    Attributes:
      score_scale_BN: factor on q.k of a query, before the bias; float32.
      weight_scale_BN: factor on a query's weights, float32; None for a softmax.
      ids_BN: segment ids, int32; None for one document without padding.
      log_sum_BN: of a softmax, the log of the sum of exp(scores) over the keys that a query sees, 0 where it sees none
        or is none; float32. None before `with_log_sums`.
    """

    score_scale_BN: Array
    weight_scale_BN: Array | None
    ids_BN: Array | None
    log_sum_BN: Array | None = None

    @property
    def softmax(self) -> bool:
        """Whether the weights are a softmax, and not relu^2."""
        return self.weight_scale_BN is None


def describe_tokens(
    ids_BN: Array | None,
    shape: tuple[int, int],
    *,
    scoring: Scoring,
    causal: bool,
    sequence_length: int | Array,
    width: int,
) -> Tokens:
    """Returns the normaliser of `scoring` as factors on q.k and, for relu2, on the weights.

    Args:
      ids_BN: segment ids, or None for one document without padding.
      shape: (B, N).
      scoring: attention function, one of FUNCTIONS, and its normaliser.
      causal: whether later keys are hidden.
      sequence_length: n for the normaliser 'paper', a number or an array [B, N].
      width: S.
    """
    ones_BN = jnp.ones(shape, jnp.float32)
    if scoring.function == 'softmax':
        return Tokens(ones_BN * width**-0.5, None, ids_BN)
    if scoring.function == 'softmax_plus' or scoring.normalizer in ('visible', 'su'):
        if ids_BN is None:
            visible_N = jnp.arange(1, shape[1] + 1) if causal else jnp.full(shape[1], shape[1])
            visible_BN = jnp.broadcast_to(visible_N, shape).astype(jnp.float32)
        else:
            visible_BN = jnp.maximum(visible_keys(ids_BN, causal=causal), 1).astype(jnp.float32)
    if scoring.function == 'softmax_plus':
        return Tokens(width**-0.5 / math.log(SOFTMAX_PLUS_KEYS) * jnp.log(visible_BN), None, ids_BN)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def whole_weights(q_BQS: Array, k_BNS: Array, bias_P: Array | None, tokens: Tokens, causal: bool) -> Array:
    """Returns A, [B, Q, N] in the type of q, of the last Q of N tokens: for short sequences, such as chunks.

    With x = q.k * score_scale + bias, A is relu(x)^2 * weight_scale, or the softmax of x, over the keys that a query
    sees, and 0 for others.

    Args:
      q_BQS: queries, bfloat16 or float32 as k is.
      k_BNS: keys. (In `weights_forward` there may be only K of them for each sequence, and the N of a sequence then are
        those of the sequence before, from the last N - K on, and its own.)
      bias_P: bias of every distance k - q from -(N - 1) to N - 1, float32 [2 N - 1], or None.
      tokens: factors and segment ids; no gradient goes there.
      causal: whether later keys are hidden.
    """
    return weights_forward(q_BQS, k_BNS, bias_P, tokens, causal=causal)[0]


def weights_forward(
    q_BQS: Array, k_BNS: Array, bias_P: Array | None, tokens: Tokens, *, causal: bool
) -> tuple[Array, tuple]:
    """Returns `whole_weights`, and what `scores_gradient` needs."""
    queries, n = q_BQS.shape[1], tokens.score_scale_BN.shape[1]
    tokens = with_log_sums(q_BQS, k_BNS, bias_P, tokens, causal=causal)
    a_BQN = weights(q_BQS, k_BNS, bias_P, tokens, (n - queries, 0), (queries, n), causal=causal)
    return a_BQN, (q_BQS, k_BNS, bias_P, tokens, a_BQN if tokens.softmax else None)


def scores_gradient(residuals: tuple, da_BQN: Array, *, causal: bool) -> tuple[Array, Array | None, Tokens]:
    """Returns the gradients of q.k, [B, Q, N] in the type of q, of the bias, and zeros for that of the tokens."""
    q_BQS, k_BNS, bias_P, tokens, a_BQN = residuals
    first, delta_BN = tokens.score_scale_BN.shape[1] - q_BQS.shape[1], None
    if tokens.softmax:
        # Rounded weights do not sum to 1: a number that all of da have in common cancels against their mean alone.
        a_BQM = a_BQN.astype(jnp.float32)
        total_BQ = a_BQM.sum(-1)
        mean_BQ = jnp.sum(a_BQM * da_BQN.astype(jnp.float32), -1) / jnp.where(total_BQ > 0, total_BQ, 1)
        delta_BN = _of_last_tokens(mean_BQ, first)
    operands, fields = (tokens, (first, 0), da_BQN, delta_BN), {'causal': causal, 'recompute': False}
    _, ds_BQN, dbias_P = weights_and_gradient(q_BQS, k_BNS, bias_P, *operands, **fields)
    if first and bias_P is not None:
        dbias_P = add_by_distance(jnp.zeros_like(bias_P), dbias_P, q_BQS.shape[1], first)
    return ds_BQN, dbias_P, no_gradient(tokens)


def _forward(q_BQS, k_BNS, bias_P, tokens, causal):
    return weights_forward(q_BQS, k_BNS, bias_P, tokens, causal=causal)


def _backward(causal, residuals, da_BQN):
    q_BQS, k_BNS, *_ = residuals
    ds_BQN, dbias_P, dtokens = scores_gradient(residuals, da_BQN, causal=causal)
    dq_BQS, dk_BNS = jnp.einsum('BNM,BMS->BNS', ds_BQN, k_BNS), jnp.einsum('BNM,BNS->BMS', ds_BQN, q_BQS)
    return dq_BQS, dk_BNS, dbias_P, dtokens


whole_weights.defvjp(_forward, _backward)


def with_log_sums(q_BQS: Array, k_BNS: Array, bias_P: Array | None, tokens: Tokens, *, causal: bool) -> Tokens:
    """Returns the tokens, for a softmax with `log_sum_BN`; see `whole_weights` for the arguments."""
    from gau.ops.kernels.quadratic_triton import log_sums_kernel

    if not tokens.softmax:
        return tokens
    (batch, queries, _), n = q_BQS.shape, tokens.score_scale_BN.shape[1]
    tiles = fit(tile_sizes.LOG_SUMS[str(q_BQS.dtype)], block_m=queries, block_n=n)
    across, down = cdiv(n, tiles.block_n), cdiv(queries, tiles.block_m)
    parts = min(across, cdiv(tiles.min_programs, down * batch))
    outputs, grid = [jax.ShapeDtypeStruct((parts, batch, queries), jnp.float32)], (parts, down, batch)
    operands = q_BQS, k_BNS, bias_P, tokens, (n - queries, 0), (queries, n)
    (log_sums,) = _launch(log_sums_kernel, tiles, *operands, outputs=outputs, grid=grid, causal=causal)
    log_sum_BQ = log_sums[0] if parts == 1 else jax.nn.logsumexp(log_sums, axis=0)
    # Of a query that sees no key; exp(-inf - 0) are its weights.
    log_sum_BQ = jnp.where(log_sum_BQ == -jnp.inf, 0, log_sum_BQ)
    return tokens._replace(log_sum_BN=_of_last_tokens(log_sum_BQ, n - queries))


def _of_last_tokens(x_BQ: Array, first: int) -> Array:
    """Returns what queries have, that begin with token `first`, in the places of their tokens, [B, N]."""
    return jnp.pad(x_BQ, ((0, 0), (first, 0))) if first else x_BQ


def no_gradient(tokens: Tokens) -> Tokens:
    """Returns zeros in the place of a gradient, for tokens before `with_log_sums`."""
    zeros = None if tokens.ids_BN is None else np.zeros(tokens.ids_BN.shape, jax.dtypes.float0)
    return Tokens(*jax.tree.map(jnp.zeros_like, (tokens.score_scale_BN, tokens.weight_scale_BN)), zeros)


def add_by_distance(sums_P: Array, diagonals: Array, n: int, offset: int | Array) -> Array:
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
    normaliser_BN = tokens.log_sum_BN if tokens.softmax else tokens.weight_scale_BN
    return launch(
        kernel,
        q,
        k,
        # A stand-in for what is None: the kernel does not read it.
        tokens.score_scale_BN if bias_P is None else bias_P,
        tokens.score_scale_BN,
        tokens.score_scale_BN if normaliser_BN is None else normaliser_BN,
        firsts if tokens.ids_BN is None else tokens.ids_BN,
        firsts,
        *more,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        N=tokens.score_scale_BN.shape[1],
        KEYS=k.shape[1],
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


def weights(q, k, bias_P, tokens, firsts, shape, *, causal) -> Array:
    """Returns the weights A of a block of `shape` (n, m) from the first query and the first key of `firsts` on.

    For q, k, bias_P and causal see `whole_weights`; the tokens are those of `with_log_sums`.
    """
    from gau.ops.kernels.quadratic_triton import weights_kernel

    (n, m), batch = shape, q.shape[0]
    a = jax.ShapeDtypeStruct((batch, n, m), q.dtype)
    tiles = fit(tile_sizes.WEIGHTS[str(q.dtype)], block_m=n, block_n=m)
    across, down = cdiv(m, tiles.block_n), cdiv(n, tiles.block_m)
    grid = min(across, cdiv(tiles.min_programs, down * batch)), down, batch
    fields = {'outputs': [a], 'grid': grid, 'causal': causal, 'SOFTMAX': tokens.softmax}
    return _launch(weights_kernel, tiles, q, k, bias_P, tokens, firsts, shape, **fields)[0]


def weights_and_gradient(
    q, k, bias_P, tokens, firsts, da, delta_BN, *, causal, recompute: bool
) -> tuple[Array, Array, Array | None]:
    """Returns the weights if `recompute`, the gradient of q.k, and that of the bias by j - i, summed over sequences.

    Args:
      q: and k, bias_P, tokens, firsts, causal: see `weights`.
      da: gradient of the weights of the block.
      delta_BN: of a softmax, the mean of da over all keys of a query, weighted by a, float32; else None.
      recompute: whether the weights are returned as well.
    """
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
        'SOFTMAX': tokens.softmax,
    }
    operands = q, k, bias_P, tokens, firsts, (n, m), da, tokens.score_scale_BN if delta_BN is None else delta_BN
    a, ds, db = _launch(weights_gradient_kernel, tiles, *operands, **fields)
    if bias_P is None:
        return a, ds, None
    # The compiler would make these sums again in the norm that gradients are clipped by, in a single block of threads.
    return a, ds, jax.lax.optimization_barrier(_sum_diagonals(db.sum(0), tiles.block_m, n, m))
