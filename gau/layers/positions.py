"""Position encodings that own parameters: the relative bias of an attention matrix and the scaled sinusoid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.errors import UserError
from gau.layers.common import KERNEL_INIT, param_dtype
from gau.ops.positions import bias_matrix, rotary_bias, rotary_bias_at, sinusoid, toeplitz_bias, toeplitz_bias_at


class RelativeBias(nn.Module):
    """A bias b[q, k] that depends on k - q alone, one for every head (docs/paper.md section 2).

    Attributes:
      kind: 'toeplitz', a table of 2 * length - 1 numbers; or 'rotary', two vectors `a` and `c` rotated by position.
      num_heads: H.
      length: longest distance + 1 that the table serves, and that `start` is for.
      width: S, even, of the vectors of the rotary form.
      dtype: compute type of the model.
      start: sqrt(length) b at the start, alike for every distance. None: every parameter is drawn from N(0, 0.02).
    """

    kind: str
    num_heads: int
    length: int
    width: int
    dtype: str
    start: float | None = None

    @nn.compact
    def __call__(self, n: int, queries_BT: Array | None = None) -> Array:
        """Returns the bias of every distance k - q between n positions, [H, 2 n - 1], float32 or wider.

        With the positions of queries, [B, T], their rows of the matrix that it is: [H, B, T, n].

        Raises:
          UserError: kind 'toeplitz' and n above `length`.
        """
        dtype = param_dtype(self.dtype)
        if self.kind == 'toeplitz':
            if n > self.length:
                raise UserError(
                    f'a relative bias of {self.length} positions cannot serve {n}: evaluate at a shorter context, or '
                    'train with relative_bias=rotary or a longer relative_bias_length'
                )
            init = KERNEL_INIT if self.start is None else nn.initializers.constant(self.start * self.length**-0.5)
            init = nn.with_logical_partitioning(init, ('heads', 'position'))
            w_HP = self.param('table', init, (self.num_heads, 2 * self.length - 1), dtype)
            if queries_BT is not None:
                return jax.vmap(lambda w: toeplitz_bias_at(w, queries_BT, n))(w_HP)
            return jax.vmap(lambda w: toeplitz_bias(w, n))(w_HP)
        init = KERNEL_INIT if self.start is None else slowest_pair_init(self.start * self.length**-0.5)
        init = nn.with_logical_partitioning(init, ('heads', 'query_key'))
        a_HS = self.param('a', init, (self.num_heads, self.width), dtype)
        c_HS = self.param('c', init, (self.num_heads, self.width), dtype)
        if queries_BT is not None:
            return jax.vmap(lambda a, c: rotary_bias_at(a, c, queries_BT, n))(a_HS, c_HS)
        return jax.vmap(lambda a, c: rotary_bias(a, c, n))(a_HS, c_HS)


def slowest_pair_init(bias: float) -> nn.initializers.Initializer:
    """Returns the init of both vectors of a rotary bias that starts near `bias` for every distance.

    The pair that turns slowest, by 1.2e-4 a position at S = 128, holds sqrt(bias) and 0 in both, which gives bias times
    the cosine of its angle: 0.97 at 2,048 positions, 0.59 at 8,192. All others are drawn from N(0, 0.02) and add about
    4e-4 sqrt(S) at random.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        half = shape[-1] // 2
        drawn = KERNEL_INIT(key, shape, dtype)
        return drawn.at[..., half - 1].set(bias**0.5).at[..., 2 * half - 1].set(0)

    return init


def bias_in_chunk(bias_HP: Array | None) -> Array | None:
    """Returns the matrix [H, C, C] of a bias by distance [H, 2 C - 1]; None for None."""
    if bias_HP is None:
        return None
    n = (bias_HP.shape[1] + 1) // 2
    return jax.vmap(lambda bias_P: bias_matrix(bias_P, n, n))(bias_HP)


class ScaledSinusoid(nn.Module):
    """The absolute sinusoid times one learned scalar that starts at 1/sqrt(D) (docs/paper.md section 2)."""

    dtype: str

    @nn.compact
    def __call__(self, positions_BN: Array, width: int) -> Array:
        """Returns what to add to the embeddings of these positions, [B, N, width]."""
        init = nn.with_logical_partitioning(nn.initializers.constant(width**-0.5), ())
        scale = self.param('scale', init, (), param_dtype(self.dtype))
        return (scale * sinusoid(positions_BN, width, dtype=jnp.dtype(self.dtype))).astype(self.dtype)
