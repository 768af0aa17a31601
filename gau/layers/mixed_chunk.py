"""Mixed chunk attention as a core: FLASH, and MC-TFM++ where a Transformer has it (docs/paper.md sections 3 and 4)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo
from gau.layers.decay_gate import DecayGate
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
      decay_gate: 'none'; or a gate of the data by which the state forgets, one number for a chunk ('scalar').
      local_window: chunks that the direct pair reads, the own one included: 1 or, if causal, 2.

    A gate and a window of two chunks are of causal attention with one head.
    """

    pairs: tuple[str, ...] = ('direct', 'linear')
    chunk_size: int = 256
    global_reduction: str = 'mean'
    decay_gate: str = 'none'
    local_window: int = 1

    def setup(self):
        """Makes the parts with parameters."""
        super().setup()
        if self.decay_gate != 'none':
            self.gate_layer = DecayGate(self.dtype, name='decay_gate')

    @property
    def reads_input(self) -> bool:
        """See the base class."""
        return self.decay_gate != 'none'

    def gate_logits(self, x_BND: Array) -> Array | None:
        """See the base class."""
        return self.gate_layer(x_BND) if self.decay_gate != 'none' else None

    def gate_parameters(self, inputs: int) -> tuple[Array, Array] | None:
        """See the base class."""
        return self.gate_layer.parameters(inputs) if self.decay_gate != 'none' else None

    @property
    def near_pairs(self) -> tuple[str, ...]:
        """Those of `pairs` that the two branches take; a subclass may have more."""
        return self.pairs

    @property
    def has_window(self) -> bool:
        """Whether single tokens are decoded in a window (`gau.ops.chunk_window`)."""
        return True

    @property
    def spec(self) -> ChunkSpec:
        """The fields that the op takes."""
        branches = 'both' if len(self.near_pairs) > 1 else {'direct': 'local', 'linear': 'global'}[self.near_pairs[0]]
        state = self.global_reduction, self.local_window
        return ChunkSpec(self.chunk_size, self.scoring, self.causal, branches, *state)

    @nn.compact
    def __call__(
        self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo, x_BND: Array | None = None
    ) -> Array:
        """See the base class."""
        # Of one branch alone there are two arrays, and both pairs of names mean them; the op uses its branch's.
        q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS = [*queries_keys] * (2 // len(self.near_pairs))
        bias_HCC = None
        if self.spec.has_local:
            q_BHNS = self.scaled(q_BHNS)
        arrays = q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS
        gate_BHN1 = None if x_BND is None else self.gate_logits(x_BND)[:, None]
        if not tokens.whole:
            return mixed_chunk_with_state(self, *arrays, gate_BHN1, v_BHNE, tokens)
        if self.spec.has_local:
            bias_HCC = bias_in_chunk(self.bias_of_sequence(v_BHNE.shape[2]))

        def attend(*arrays, segment_ids_BN, sequence_axis):
            *arrays, gate_BN1, v_BNE, bias_CC = arrays
            return mixed_chunk_attention(
                *(*arrays, v_BNE),
                spec=self.spec,
                segment_ids_BN=segment_ids_BN,
                bias_CC=bias_CC,
                gate_BN1=gate_BN1,
                impl=self.impl,
                sequence_axis=sequence_axis,
            )

        return attention_over_mesh(
            attend,
            *(*arrays, gate_BHN1, v_BHNE),
            bias=bias_HCC,
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=self.chunk_size if self.impl == 'xla' else None,
        )

    def bias_of_sequence(self, n: int) -> Array | None:
        """Returns the bias of every distance in the local branch, [H, 2 n - 1], n up to 2 C; None: no bias."""
        return self.bias(n if n <= self.chunk_size else self.local_window * self.chunk_size)

    @property
    def gated_token_multiple(self) -> int | None:
        """See the base class."""
        return self.chunk_size if self.impl == 'pallas' else None

    def gated_with_state(
        self, *arrays: Array, bias_P: Array | None, gate_BN1: Array | None, tokens: TokenInfo
    ) -> Array:
        """See the base class."""
        if bias_P is not None:
            # Of a window also where the block is one chunk: there may be one before it.
            bias_P = self.bias(self.spec.window * self.chunk_size)[0]
        return gated_mixed_chunk_with_state(self, *arrays, bias_P=bias_P, gate_BT1=gate_BN1, tokens=tokens)

    def gated(
        self,
        p_BNW: Array,
        bias_2E: Array,
        *queries_keys: Array,
        bias_P: Array | None,
        gate_BN1: Array | None,
        segment_ids_BN: Array | None,
        sequence_axis: str | None,
        **fields,
    ) -> Array:
        """See the base class; `fields` are what a subclass has for the op."""
        return gated_mixed_chunk(
            *(p_BNW, bias_2E, *queries_keys),
            spec=self.spec,
            segment_ids_BN=segment_ids_BN,
            bias_P=bias_P,
            gate_BN1=gate_BN1,
            kernels=self.impl,
            sequence_axis=sequence_axis,
            **fields,
        )
