"""What stands between a layer's projections: an attention from queries, keys and values to outputs.

The gated unit and the multi-head layer call the same cores. A core shares the scope of the layer around it
(`flax.linen.share_scope`): what parameters and states it has stand beside the layer's own.
"""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo


class AttentionCore(nn.Module):
    """Base class of the cores.

    Attributes:
      causal: whether later tokens are hidden.
      impl: implementation of the op.
      dtype: compute type.
      pairs: the pairs of queries and keys that the core takes, in their order: 'direct' is the layer's own, 'linear'
        one for a linear attention, 'far' one for earlier chunks. A gated unit makes each pair by scale and offset from
        Z. A multi-head layer rotates its projections for the direct pair, makes the linear one by scale and offset from
        them, and has no far one.
    """

    causal: bool
    impl: str
    dtype: str
    pairs: tuple[str, ...] = ('direct',)

    @property
    def reads_input(self) -> bool:
        """Whether the core makes something of the layer's normalised input itself; then it is called with it."""
        return False

    def __call__(
        self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo, x_BND: Array | None = None
    ) -> Array:
        """Returns the outputs of every head, [B, H, N, E]; finite at padding.

        Args:
          queries_keys: queries and keys of each of `pairs`, [B, H, N, S], rotated by position where the layer does so.
          v_BHNE: values.
          tokens: what the layers of one call share.
          x_BND: the input of the layer, for a core with `reads_input`.
        """
        raise NotImplementedError
