"""The short convolution between a norm and its layer, with its parameters and its decoding state."""

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
        if tokens.decode is None:
            return short_convolution(x_BND, weights_WD, tokens.segment_ids_BN, causal=self.causal)
        before = self.variable('cache', BEFORE, jnp.zeros, (len(x_BND), *shape), x_BND.dtype)
        y_BND, before.value = short_convolution_block(x_BND, weights_WD, before.value, tokens.decode.length_B)
        return y_BND
