"""Feed-forward layers: GELU MLP, GEGLU and SwiGLU."""

import flax.linen as nn
import jax
from jax import Array

from gau.layers.common import Linear, TokenInfo, constrain

# kind: (activation, whether a second projection is multiplied by it)
KINDS = {
    'gelu': (jax.nn.gelu, False),
    'geglu': (jax.nn.gelu, True),
    'swiglu': (jax.nn.silu, True),
}


class FeedForward(nn.Module):
    """act(x W1) W2, or gated (act(x W1) * x W3) W2, with biases; [B, N, D] to [B, N, D].

    Attributes:
      kind: 'gelu', 'geglu' or 'swiglu'.
      hidden_dim: inner width E.
      dtype: compute type.
    """

    kind: str
    hidden_dim: int
    dtype: str

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies the layer to normalised inputs."""
        del tokens  # Every token by itself.
        activation, gated = KINDS[self.kind]
        features, axes = ((2, self.hidden_dim), (None, 'expanded')) if gated else ((self.hidden_dim,), ('expanded',))
        h = Linear(features, ('embed',), axes, self.dtype, name='in')(x_BND)
        h_BNE = activation(h[:, :, 0]) * h[:, :, 1] if gated else activation(h)
        h_BNE = constrain(h_BNE, 'batch', 'length', 'act_expanded')
        return Linear((x_BND.shape[-1],), ('expanded',), ('embed',), self.dtype, name='out')(h_BNE)
