"""From q.k to attention weights: attention functions and normalisers (docs/paper.md sections 1, 2 and 7)."""

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


class Scoring(NamedTuple):
    """How q.k becomes a weight: f((q.k) / n + b), with what is n.

    Attributes:
      function: 'softmax' or a key of ATTENTION_FUNCTIONS.
      normalizer: None with softmax; else
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

    The mask goes on after the function, for not every f(0) is 0; softmax is the exception: it is masked before, and a
    query that sees no key gets a row of zeros. The bias stands outside the division (docs/paper.md section 1).

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
    if scoring.function == 'softmax':
        scores = scores * q.shape[-1] ** -0.5 + bias
        return masked_softmax(scores, mask)

    function = ATTENTION_FUNCTIONS[scoring.function]
    if scoring.normalizer in ('visible', 'su'):
        visible = k.shape[-2] if mask is None else mask.sum(-1, keepdims=True)
        visible = jnp.maximum(jnp.asarray(visible, dtype), 1)
    if scoring.normalizer == 'su':
        weights = function(scores * q.shape[-1] ** -0.5 + bias) / visible
    elif scoring.normalizer == 'visible':
        weights = function(scores / visible + bias)
    elif scoring.normalizer == 'fixed':
        weights = function(scores / scoring.length + bias)
    else:
        weights = function(scores / jnp.maximum(jnp.asarray(sequence_length, dtype), 1) + bias)
    return weights if mask is None else jnp.where(mask, weights, 0)


def masked_softmax(scores: Array, mask: Array | None) -> Array:
    """Softmax over the last axis of what `mask` allows, exactly 0 elsewhere; a row that allows nothing is all 0."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    # A row without a visible key is computed on zeros (no NaN to differentiate) and then cleared.
    seen = mask.any(-1, keepdims=True)
    lowest = jnp.finfo(scores.dtype).min
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.where(seen, lowest, 0)), axis=-1)
    return jnp.where(mask, weights, 0)
