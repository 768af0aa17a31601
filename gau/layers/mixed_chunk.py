"""Mixed chunk attention as a core: FLASH, and MC-TFM++ where a Transformer has it (docs/paper.md sections 3 and 4)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo
from gau.layers.positions import bias_in_chunk
from gau.layers.quadratic import QuadraticCore
from gau.layers.sharding import attention_over_mesh
from gau.layers.state import gated_mixed_chunk_with_state, mixed_chunk_with_state
from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
from gau.ops.mixed_chunk_attention import ChunkSpec, mixed_chunk_attention


class MixedChunkCore(QuadraticCore):
    """The attention of `QuadraticCore` inside chunks of C tokens, and a linear attention to what it does not see.

    The linear one reads the chunks before, or all tokens, the own chunk's too, where the model is bidirectional.

    Attributes:
      pairs: 'direct' for the local branch, inside chunks; 'linear' for the global one; or both.
      chunk_size: C.
      global_reduction: 'mean' or 'sum' over the tokens that a query sees.
      global_decay: factor on the weight of a token in it for every chunk in between; 1 or, if causal, less.
    """

    pairs: tuple[str, ...] = ('direct', 'linear')
    chunk_size: int = 256
    global_reduction: str = 'mean'
    global_decay: float = 1.0

    @property
    def spec(self) -> ChunkSpec:
        """What the op asks for."""
        branches = 'both' if len(self.pairs) > 1 else {'direct': 'local', 'linear': 'global'}[self.pairs[0]]
        return ChunkSpec(self.chunk_size, self.scoring, self.causal, branches, self.global_reduction, self.global_decay)

    @nn.compact
    def __call__(self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        """See the base class."""
        # Of one branch alone there are two arrays, and both pairs of names mean them; the op uses its branch's.
        q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS = [*queries_keys] * (2 // len(self.pairs))
        bias_HCC = None
        if self.spec.has_local:
            q_BHNS = self.scaled(q_BHNS)
        arrays = q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS, v_BHNE
        if not tokens.whole:
            return mixed_chunk_with_state(self, *arrays, tokens)
        if self.spec.has_local:
            bias_HCC = bias_in_chunk(self.bias_of_sequence(v_BHNE.shape[2]))

        def attend(*arrays, segment_ids_BN, sequence_axis):
            *arrays, bias_CC = arrays
            return mixed_chunk_attention(
                *arrays,
                spec=self.spec,
                segment_ids_BN=segment_ids_BN,
                bias_CC=bias_CC,
                impl=self.impl,
                sequence_axis=sequence_axis,
            )

        return attention_over_mesh(
            attend,
            *arrays,
            bias=bias_HCC,
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=self.chunk_size if self.impl == 'xla' else None,
        )

    def bias_of_sequence(self, n: int) -> Array | None:
        """Returns the bias between the positions of a chunk by distance, [H, 2 min(n, C) - 1], or None."""
        return self.bias(min(self.chunk_size, n))

    @property
    def gated_token_multiple(self) -> int | None:
        """See the base class."""
        return self.chunk_size if self.impl == 'pallas' else None

    def gated_with_state(self, *arrays: Array, bias_P: Array | None, tokens: TokenInfo) -> Array:
        """See the base class."""
        return gated_mixed_chunk_with_state(self, *arrays, bias_P=bias_P, tokens=tokens)

    def gated(
        self,
        p_BNW: Array,
        bias_2E: Array,
        *queries_keys: Array,
        bias_P: Array | None,
        segment_ids_BN: Array | None,
        sequence_axis: str | None,
    ) -> Array:
        """See the base class."""
        return gated_mixed_chunk(
            *(p_BNW, bias_2E, *queries_keys),
            spec=self.spec,
            segment_ids_BN=segment_ids_BN,
            bias_P=bias_P,
            kernels=self.impl,
            sequence_axis=sequence_axis,
        )
