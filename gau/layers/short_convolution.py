"""What lets a token see its neighbours without attention, with parameters and decoding state."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.common import TokenInfo, param_dtype
from gau.ops.short_convolution import short_convolution, short_convolution_block

# The state's one array, in the collection 'cache'.
BEFORE = 'before'


class ShortConvolution(nn.Module):
    """Adds to each token a weighted sum of its neighbours, column by column (`gau.ops.short_convolution`).

    The weights start as zeros: the model is at first the one without it.

    Attributes:
      width: W, neighbours; those before a token if `causal`, else half of them before it and half after.
      causal: whether later tokens are hidden.
      dtype: type of the result.
    """

    width: int
    causal: bool
    dtype: str

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Returns [B, N, D]."""
        shape = self.width, x_BND.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, 'norm'))
        weights_WD = self.param('weights', init, shape, param_dtype(self.dtype))
        return _convolved(self, x_BND, weights_WD, tokens, causal=self.causal)


class KeyShift(nn.Module):
    """Mixes each token with the one before it, column by column: (1 - m) z_n + m z_(n - 1), z_(-1) = 0.

    As queries and keys are transforms of one Z column by column, a query can look for tokens that are like its own, and
    not for tokens that came after one like its own, which is how a text is copied. Shifted keys are found by the token
    before them. m starts between 0 and 1, evenly over the columns.

    Attributes:
      dtype: type of the result.
    """

    dtype: str

    @nn.compact
    def __call__(self, z_BNS: Array, tokens: TokenInfo) -> Array:
        """Returns [B, N, S]."""
        mix_S = self.mix(z_BNS.shape[-1])
        shifted_BNS = _convolved(self, z_BNS, mix_S[None], tokens, causal=True)
        return (shifted_BNS - mix_S * z_BNS).astype(z_BNS.dtype)

    def mix(self, width: int) -> Array:
        """Returns the parameter m, [S]."""

        def start(key, shape, dtype):
            del key
            return jnp.linspace(0, 1, *shape, dtype=dtype)

        init = nn.with_logical_partitioning(start, ('query_key',))
        return self.param('mix', init, (width,), param_dtype(self.dtype))


class KeyMix(KeyShift):
    """The parameter of a `KeyShift`, for an op that does the rest."""

    @nn.compact
    def __call__(self, width: int) -> Array:
        """Returns m, [S]."""
        return self.mix(width)


def _convolved(module: nn.Module, x_BND: Array, weights_WD: Array, tokens: TokenInfo, *, causal: bool) -> Array:
    if tokens.decode is None:
        return short_convolution(x_BND, weights_WD, tokens.segment_ids_BN, causal=causal)
    before = module.variable('cache', BEFORE, jnp.zeros, (len(x_BND), *weights_WD.shape), x_BND.dtype)
    y_BND, before.value = short_convolution_block(x_BND, weights_WD, before.value, tokens.decode.length_B)
    return y_BND
