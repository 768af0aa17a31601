"""From q.k to attention weights: attention functions and normalisers (docs/paper.md sections 1, 2 and 7)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SMOOTH_RELU_EPSILON = 0.05


def relu2(x: Array) -> Array:
    """The paper's attention function: relu(x)^2."""
    return jnp.square(jax.nn.relu(x))


def laplace(x: Array) -> Array:
    """Mega's smooth step, 0.5 (1 + erf((x - mu) / (sigma sqrt 2))) with mu = sqrt(1/2), sigma = sqrt(1/(4 pi)).

    It is 0.006 at 0 and not 0: masks must come after it (docs/paper.md section 7, trap 3).
    """
    mu, sigma = 0.5**0.5, (0.25 / jnp.pi) ** 0.5
    return 0.5 * (1.0 + jax.lax.erf((x - mu) / (sigma * 2**0.5)))


def softplus2(x: Array) -> Array:
    """softplus(x)^2, a smooth relu^2 that is (log 2)^2 at 0."""
    return jnp.square(jax.nn.softplus(x))


def smooth_relu2(x: Array, epsilon: float = SMOOTH_RELU_EPSILON) -> Array:
    """r(x)^2 with r(x) = (x + eps)^2 / (4 eps) on |x| <= eps, 0 below and x above.

    r meets 0 at -eps and x at eps with the slopes 0 and 1, so its square meets 0 and x^2 with their slopes: it is
    continuously differentiable. (The formula in circulation, x^4/(4 eps^2) + x^2/2 on |x| <= eps, is 3 eps^2/4 at both
    ends and jumps.)
    """
    middle = jnp.square(x + epsilon) / (4 * epsilon)
    return jnp.square(jnp.where(x < -epsilon, 0.0, jnp.where(x > epsilon, x, middle)))


ATTENTION_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    'relu2': relu2,
    'laplace': laplace,
    'softplus2': softplus2,
    'smooth_relu2': smooth_relu2,
}


# softmax(q.k / sqrt(S)), and the same sharpened with the number of keys: at 512 of them they are equal
# (https://kexue.fm/archives/8823).
SOFTMAXES = ('softmax', 'softmax_plus')
SOFTMAX_PLUS_KEYS = 512


class Scoring(NamedTuple):
    """How q.k becomes a weight: A = f(q.k / n + b), with what is n.

    Attributes:
      function: 'softmax', 'softmax_plus' or a key of ATTENTION_FUNCTIONS.
      normalizer: None with these two; else
        'paper'    n = length of the token's own sequence (of its document where there are segment ids); the chunk in
                   FLASH's local branch;
        'fixed'    n = `length`;
        'visible'  n = number of keys this query sees;
        'su'       f(q.k / sqrt(S) + b) / number of keys this query sees.
      length: the constant of 'fixed'.
    """

    function: str = 'relu2'
    normalizer: str | None = 'paper'
    length: int = 512

    @property
    def compares_keys(self) -> bool:
        """Whether a weight depends on what other keys its query sees."""
        return self.normalizer not in ('paper', 'fixed')

    def normalise(self, scores: Array, *, width: int, sequence_length: int | Array, mask: Array | None) -> Array:
        """Returns q.k / n, of the shape of the scores q.k, [..., N, M], float32 or float64.

        Args:
          scores: q.k.
          width: S.
          sequence_length: n of 'paper', a number or an array that broadcasts to [..., N, 1].
          mask: bool, broadcasts to [..., N, M]; None: every query sees every key.

        Raises:
          ValueError: an unknown normaliser, or none where the function needs one.
        """
        if self.function == 'softmax' or self.normalizer == 'su':
            return scores * width**-0.5
        if self.function == 'softmax_plus':
            return scores * (width**-0.5 / math.log(SOFTMAX_PLUS_KEYS) * jnp.log(visible_keys(scores, mask)))
        if self.normalizer == 'visible':
            return scores / visible_keys(scores, mask)
        if self.normalizer == 'fixed':
            return scores / self.length
        if self.normalizer == 'paper':
            return scores / jnp.maximum(jnp.asarray(sequence_length, scores.dtype), 1)
        raise ValueError(f'normalizer {self.normalizer!r} does not exist for {self.function}')

    def activate(self, x: Array, mask: Array | None) -> Array:
        """Returns f(x) where the mask allows and exactly 0 elsewhere, [..., N, M].

        The mask goes on after the function, for not every f(0) is 0; softmax is the exception: it is masked before, and
        a query that sees no key gets a row of zeros.
        """
        if self.function in SOFTMAXES:
            return masked_softmax(x, mask)
        weights = ATTENTION_FUNCTIONS[self.function](x)
        if self.normalizer == 'su':
            weights = weights / visible_keys(x, mask)
        return weights if mask is None else jnp.where(mask, weights, 0)


def visible_keys(scores: Array, mask: Array | None) -> Array:
    """Returns how many keys each query sees, at least 1, [..., N, 1] in the dtype of the scores [..., N, M]."""
    visible = scores.shape[-1] if mask is None else mask.sum(-1, keepdims=True)
    return jnp.maximum(jnp.asarray(visible, scores.dtype), 1)


def attention_weights(
    q: Array,
    k: Array,
    *,
    scoring: Scoring,
    sequence_length: int | Array,
    mask: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Returns the attention matrix A = f(q k^T / n + b) where `mask` allows and exactly 0 elsewhere.

    The bias stands outside the division (docs/paper.md section 1).

    Args:
      q: queries [..., N, S].
      k: keys [..., M, S].
      scoring: function and normaliser.
      sequence_length: n for the normaliser 'paper', a number or an array that broadcasts to [..., N, 1].
      mask: bool, broadcasts to [..., N, M]; None lets everything through.
      bias: broadcasts to [..., N, M], or None.

    Returns:
      A, [..., N, M], float32 (float64 for float64 inputs): q.k/n beside b is below bfloat16's resolution.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum('...NS,...MS->...NM', q, k, preferred_element_type=dtype)
    bias = 0.0 if bias is None else bias.astype(dtype)
    x = scoring.normalise(scores, width=q.shape[-1], sequence_length=sequence_length, mask=mask) + bias
    return scoring.activate(x, mask)


def masked_softmax(scores: Array, mask: Array | None) -> Array:
    """Softmax over the last axis of what `mask` allows, exactly 0 elsewhere; a row that allows nothing is all 0."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    # A row without a visible key is computed on zeros (no NaN to differentiate) and then cleared.
    seen = mask.any(-1, keepdims=True)
    lowest = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.where(seen, lowest, 0)), axis=-1)
    return jnp.where(mask, weights, 0)
