"""Performer's linear attention as a core (docs/paper.md section 4)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax import Array

from gau.layers.common import TokenInfo, over_heads
from gau.layers.core import AttentionCore
from gau.layers.state import linear_with_state
from gau.ops.linear_attention import favor_features, linear_attention, orthogonal_directions, relu_features


class PerformerCore(AttentionCore):
    """Linear attention through a feature map of queries and keys.

    Attributes:
      feature_map: 'relu' or 'favor'.
      num_features: random features of 'favor'; fixed constants, not trained (see `orthogonal_directions`).
    """

    feature_map: str = 'relu'
    num_features: int | None = None

    @nn.compact
    def __call__(self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        """See the base class."""
        q_BHNS, k_BHNS = queries_keys
        if self.feature_map == 'relu':
            q_BHNF, k_BHNF, log_scale_BHN = relu_features(q_BHNS), relu_features(k_BHNS), None
        else:
            w_HFS = orthogonal_directions(self.num_features, q_BHNS.shape[-1], q_BHNS.shape[1])
            (q_BHNF, _), (k_BHNF, log_scale_BHN) = (
                jax.vmap(favor_features, (1, 0), 1)(x, w_HFS) for x in (q_BHNS, k_BHNS)
            )
        if tokens.decode is not None:
            return linear_with_state(self, q_BHNF, k_BHNF, v_BHNE, log_scale_BHN, tokens)

        def attend(q_BNF, k_BNF, v_BNE, log_scale_BN, _):
            return linear_attention(
                q_BNF,
                k_BNF,
                v_BNE,
                causal=self.causal,
                key_log_scale_BN=log_scale_BN,
                segment_ids_BN=tokens.segment_ids_BN,
                impl=self.impl,
            )

        return over_heads(attend, q_BHNF, k_BHNF, v_BHNE, log_scale_BHN, bias=None)
