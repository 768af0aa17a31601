"""The core of a layer: the attention between its projections, from queries, keys and values to outputs.

The gated unit and the multi-head layer call the same cores. A core shares the scope of the layer around it
(`flax.linen.share_scope`), so its parameters and states stand beside the layer's own.
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
      pairs: names of the pairs of queries and keys that the core takes, in order: 'direct' for the main attention,
        'linear' for a linear attention beside it, 'far' for attention to whole earlier chunks. A gated unit makes each
        pair of Z by scale and offset. A multi-head layer takes its rotated projections as the direct pair, makes the
        linear pair of the projections by scale and offset, and has no far pair.
    """

    causal: bool
    impl: str
    dtype: str
    pairs: tuple[str, ...] = ('direct',)

    @property
    def reads_input(self) -> bool:
        """Whether the core also reads the layer's normalised input; it is then called with it."""
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
