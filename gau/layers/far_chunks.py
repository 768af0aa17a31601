"""Mixed chunk attention that reads a few earlier chunks exactly as well (`gau.ops.far_chunks`)."""

from collections.abc import Sequence

from jax import Array

from gau.layers.common import TokenInfo
from gau.layers.mixed_chunk import MixedChunkCore
from gau.layers.sharding import attention_over_mesh
from gau.ops.far_chunks import far_chunks
from gau.ops.kernels import far_chunks as kernels
from gau.ops.quadratic_attention import gate_and_values


class FarChunksCore(MixedChunkCore):
    """A `MixedChunkCore` whose `pairs` end with one more, 'far', and the sum of both attentions.

    Where the first is in kernels the second is as well. Where devices share the tokens of a sequence, each computes all
    of it.

    Attributes:
      far_chunks: how many chunks the queries of a chunk read.
    """

    far_chunks: int = 1

    @property
    def near_pairs(self) -> tuple[str, ...]:
        """See the base class."""
        return self.pairs[:-1]

    def __call__(
        self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo, x_BND: Array | None = None
    ) -> Array:
        """See the base class."""
        *near, q_BHNS, k_BHNS = queries_keys

        def attend(q_BNS, k_BNS, v_BNE, bias, *, segment_ids_BN, sequence_axis):
            del bias, sequence_axis  # There are none.
            return self.read(q_BNS, k_BNS, v_BNE, segment_ids_BN)

        far_BHNE = attention_over_mesh(
            attend,
            *(q_BHNS, k_BHNS, v_BHNE),
            bias=None,
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=None,
        )
        return super().__call__(near, v_BHNE, tokens, x_BND) + far_BHNE

    def read(self, q_BNS: Array, k_BNS: Array, v_BNE: Array, segment_ids_BN: Array | None) -> Array:
        """Returns what one head reads of the earlier chunks, [B, N, E]."""
        fields = {'chunk_size': self.chunk_size, 'chunks': self.far_chunks, 'segment_ids_BN': segment_ids_BN}
        if self.impl == 'triton':
            return kernels.far_chunks(q_BNS, k_BNS, v_BNE, **fields)
        return far_chunks(q_BNS, k_BNS, v_BNE, **fields, impl=self.impl)

    def gated(
        self, p_BNW: Array, bias_2E: Array, *queries_keys: Array, segment_ids_BN: Array | None, **fields
    ) -> Array:
        """See the base class."""
        *near, q_BNS, k_BNS = queries_keys
        near_BNE = super().gated(p_BNW, bias_2E, *near, segment_ids_BN=segment_ids_BN, **fields)
        u_BNE, v_BNE = gate_and_values(p_BNW, bias_2E)
        return near_BNE + u_BNE * self.read(q_BNS, k_BNS, v_BNE, segment_ids_BN)
