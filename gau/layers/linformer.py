"""Linformer's attention as a core (docs/paper.md section 4)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from gau.errors import UserError
from gau.layers.common import TokenInfo, over_heads, param_dtype
from gau.layers.core import AttentionCore
from gau.ops.linformer import linformer_attention


class LinformerCore(AttentionCore):
    """Attention to U slots, learned mixtures along the sequence that the heads of a layer share; never causal.

    Attributes:
      projection_rank: U.
      projection_length: longest document that the projections serve.
    """

    projection_rank: int = 256
    projection_length: int = 512

    def setup(self):
        """Makes the two projections along the sequence."""
        shape = (self.projection_length, self.projection_rank)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.projection_length**-0.5), ('position', None))
        self.key_projection = self.param('key_projection', init, shape, param_dtype(self.dtype))
        self.value_projection = self.param('value_projection', init, shape, param_dtype(self.dtype))

    def __call__(self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        """See the base class.

        Raises:
          UserError: the sequence is longer than the projections.
          ValueError: the layer is causal.
        """
        n = v_BHNE.shape[2]
        if self.causal:
            raise ValueError('Linformer has no causal form')
        if n > self.projection_length:
            raise UserError(f'Linformer projects up to {self.projection_length} tokens (projection_length), not {n}')
        e_BNU, f_BNU = self.key_projection[tokens.positions_BN], self.value_projection[tokens.positions_BN]

        def attend(q_BNS, k_BNS, v_BNE, _):
            return linformer_attention(
                q_BNS, k_BNS, v_BNE, e_BNU, f_BNU, segment_ids_BN=tokens.segment_ids_BN, impl=self.impl
            )

        return over_heads(attend, *queries_keys, v_BHNE, bias=None)
