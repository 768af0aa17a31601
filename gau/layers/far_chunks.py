"""Mixed chunk attention that reads a few earlier chunks exactly as well (`gau.ops.far_chunks`)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo
from gau.layers.mixed_chunk import MixedChunkCore
from gau.layers.sharding import attention_over_mesh
from gau.layers.state import far_chunks_with_state
from gau.ops.far_chunks import far_chunks


class FarChunksCore(MixedChunkCore):
    """A `MixedChunkCore` whose `pairs` end with one more, 'far', and the sum of both attentions.

    Where the first is in kernels the second is a part of them. Where devices share the tokens of a sequence, each
    computes all of the second.

    Attributes:
      far_chunks: how many chunks the queries of a chunk read.
    """

    far_chunks: int = 1

    @property
    def near_pairs(self) -> tuple[str, ...]:
        """See the base class."""
        return self.pairs[:-1]

    @property
    def has_window(self) -> bool:
        """See the base class."""
        return self.far_chunks > 1 and super().has_window

    # Compact for the decoding state, as that of the base class.
    @nn.compact
    def __call__(
        self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo, x_BND: Array | None = None
    ) -> Array:
        """See the base class."""
        *near, q_BHNS, k_BHNS = queries_keys
        if not tokens.whole:
            far_BHNE = far_chunks_with_state(self, q_BHNS, k_BHNS, v_BHNE, tokens)
            return super().__call__(near, v_BHNE, tokens, x_BND) + far_BHNE

        def attend(q_BNS, k_BNS, v_BNE, bias, *, segment_ids_BN, sequence_axis):
            del bias, sequence_axis  # There are none.
            fields = {'chunk_size': self.chunk_size, 'chunks': self.far_chunks, 'segment_ids_BN': segment_ids_BN}
            return far_chunks(q_BNS, k_BNS, v_BNE, **fields, impl=self.impl)

        far_BHNE = attention_over_mesh(
            attend,
            *(q_BHNS, k_BHNS, v_BHNE),
            bias=None,
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=None,
        )
        return super().__call__(near, v_BHNE, tokens, x_BND) + far_BHNE

    def gated(self, p_BNW: Array, bias_2E: Array, *queries_keys: Array, **fields) -> Array:
        """See the base class."""
        *near, q_BNS, k_BNS = queries_keys
        far = {'far_BNS': (q_BNS, k_BNS), 'far_chunks': self.far_chunks}
        return super().gated(p_BNW, bias_2E, *near, **fields, **far)
