"""Combiner's factorised attention as a core (docs/paper.md section 4)."""

from collections.abc import Sequence

from jax import Array

from gau.layers.common import TokenInfo, over_heads
from gau.layers.core import AttentionCore
from gau.ops.combiner import combiner_attention
from gau.ops.tracing import choose


class CombinerCore(AttentionCore):
    """Combiner, axial and row-major (see `gau.ops.combiner`).

    Attributes:
      chunk_size: tokens in a row.
    """

    chunk_size: int = 32

    def __call__(self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        """See the base class."""
        choose(self.impl, {'reference': None})

        def attend(q_BNS, k_BNS, v_BNE, _):
            return combiner_attention(
                q_BNS,
                k_BNS,
                v_BNE,
                row_length=self.chunk_size,
                causal=self.causal,
                segment_ids_BN=tokens.segment_ids_BN,
            )

        return over_heads(attend, *queries_keys, v_BHNE, bias=None)
