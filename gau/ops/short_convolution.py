"""A convolution over a few tokens, column by column: every token sees its neighbours before any attention does."""

import jax
import jax.numpy as jnp
from jax import Array


def short_convolution(
    x_BND: Array, weights_WD: Array, segment_ids_BN: Array | None = None, *, causal: bool = True
) -> Array:
    """Returns x plus a weighted sum of neighbours: x_n + sum_i w_i * x_(n - offset_i), [B, N, D] in the type of x.

    The W neighbours are those before a token, w_0 the nearest's; where it is not causal, W / 2 before it and then W / 2
    after it. Those of other documents, padding and what is outside of the sequence count as zeros.

    Args:
      x_BND: tokens.
      weights_WD: the weights of each column, added up in their type.
      segment_ids_BN: documents and padding (see gau.ops), or None.
      causal: whether later tokens are hidden.
    """
    total_BND = x_BND.astype(weights_WD.dtype)
    for offset, weights_D in zip(_offsets(len(weights_WD), causal), weights_WD, strict=True):
        shifted_BND = _shift(x_BND, offset)
        if segment_ids_BN is not None:
            same_BN = (_shift(segment_ids_BN, offset) == segment_ids_BN) & (segment_ids_BN > 0)
            shifted_BND = jnp.where(same_BN[..., None], shifted_BND, 0)
        total_BND += weights_D * shifted_BND
    return total_BND.astype(x_BND.dtype)


def follows(segment_ids_BN: Array | None, shape: tuple[int, int]) -> Array:
    """Returns 1 where a token has the one before it in its document, 0 elsewhere, float32 [B, N] of that shape."""
    ids_BN = jnp.ones(shape, jnp.int32) if segment_ids_BN is None else segment_ids_BN
    same_BN = (_shift(ids_BN, 1) == ids_BN) & (ids_BN > 0)
    return jnp.broadcast_to(same_BN, shape).astype(jnp.float32)


def short_convolution_block(x_BTD: Array, weights_WD: Array, before_BWD: Array, length_B: Array) -> tuple[Array, Array]:
    """The causal convolution of the next T tokens of each row, right-padded.

    Args:
      x_BTD: the tokens.
      weights_WD: see `short_convolution`.
      before_BWD: the W tokens before them; zeros before the first of a sequence.
      length_B: int32, how many of the T are the row's.

    Returns:
      What `short_convolution` makes of them, [B, T, D], meaningless at padding; and the last W tokens now.
    """
    w = len(weights_WD)
    all_BMD = jnp.concatenate([before_BWD, x_BTD.astype(before_BWD.dtype)], axis=1)
    y_BTD = short_convolution(all_BMD, weights_WD)[:, w:].astype(x_BTD.dtype)
    places_BW = length_B[:, None] + jnp.arange(w)
    return y_BTD, jnp.take_along_axis(all_BMD, places_BW[..., None], axis=1)


def _offsets(w: int, causal: bool) -> list[int]:
    before = list(range(1, w + 1))
    return before if causal else before[: w // 2] + [-offset for offset in before[: w // 2]]


def _shift(x_BN: Array, offset: int) -> Array:
    """Returns x with token n - offset at place n, and zeros where there is none."""
    edges = [(offset, -offset, 0) if axis == 1 else (0, 0, 0) for axis in range(x_BN.ndim)]
    return jax.lax.pad(x_BN, jnp.zeros((), x_BN.dtype), edges)
