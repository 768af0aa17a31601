"""Quadratic attention as a core: relu^2 in FLASH-Quad, softmax in the Transformers (docs/paper.md section 1)."""

from collections.abc import Sequence

import flax.linen as nn
from jax import Array

from gau.layers.common import Temperature, TokenInfo
from gau.layers.core import AttentionCore
from gau.layers.positions import RelativeBias
from gau.layers.sharding import attention_over_mesh, over_mesh
from gau.layers.state import begin_quadratic_state, quadratic_with_state
from gau.ops.kernels import decode_cache, gated_quadratic, launch, pallas, tpu_quadratic
from gau.ops.kernels import quadratic as quadratic_kernels
from gau.ops.kernels.cudnn_attention import cudnn_attention
from gau.ops.kernels.splash_attention import splash_attention
from gau.ops.quadratic_attention import gate_and_values, quadratic_attention
from gau.ops.scores import Scoring


class QuadraticCore(AttentionCore):
    """A V with A = f(Q K^T / n + b): every query against every key that it sees.

    Attributes:
      num_heads: H.
      width: S, of queries and keys.
      scoring: attention function f and normaliser n.
      temperature: 'learned' multiplies q.k by one learned number, 'none' does not.
      relative_bias: b: 'toeplitz', 'rotary' or 'none'.
      relative_bias_length: n, the positions that the Toeplitz table serves, and that a start is for.
      relative_bias_start: sqrt(n) b at the start, or None for the paper's (see `RelativeBias`).
    """

    num_heads: int = 1
    width: int = 128
    scoring: Scoring = Scoring()
    temperature: str = 'none'
    relative_bias: str = 'none'
    relative_bias_length: int = 512
    relative_bias_start: float | None = None

    def setup(self):
        """Makes the parts with parameters."""
        if self.temperature == 'learned':
            self.temperature_layer = Temperature(name='temperature')
        if self.relative_bias != 'none':
            shape = self.num_heads, self.relative_bias_length, self.width
            self.bias_layer = RelativeBias(
                self.relative_bias, *shape, self.dtype, self.relative_bias_start, name='relative_bias'
            )

    # Compact for the decoding state, whose variables it makes (`gau.layers.state`).
    @nn.compact
    def __call__(self, queries_keys: Sequence[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        """See the base class.

        Raises:
          ValueError: 'cudnn' or 'splash' for what is not plain softmax.
        """
        q_BHNS, k_BHNS = queries_keys
        q_BHNS = self.scaled(q_BHNS)
        if not tokens.whole:
            return quadratic_with_state(self, q_BHNS, k_BHNS, v_BHNE, tokens)
        if tokens.decode is not None:
            begin_quadratic_state(self, k_BHNS, v_BHNE)
        if self.impl in ('cudnn', 'splash') and (self.scoring.function != 'softmax' or self.relative_bias != 'none'):
            raise ValueError(f'{self.impl} has softmax without a relative bias only')
        if self.impl == 'splash':
            return self.splash(q_BHNS, k_BHNS, v_BHNE, tokens)
        if self.impl == 'cudnn':
            q_BNHS, k_BNHS, v_BNHE = (x.swapaxes(1, 2) for x in (q_BHNS, k_BHNS, v_BHNE))
            o_BNHE = cudnn_attention(q_BNHS, k_BNHS, v_BNHE, causal=self.causal, segment_ids_BN=tokens.segment_ids_BN)
            return o_BNHE.swapaxes(1, 2)

        def attend(q_BNS, k_BNS, v_BNE, bias_P, *, segment_ids_BN, sequence_axis):
            arrays = q_BNS, k_BNS, v_BNE
            fields = {
                'scoring': self.scoring,
                'causal': self.causal,
                'segment_ids_BN': segment_ids_BN,
                'bias_P': bias_P,
            }
            if self.impl == 'triton':
                return quadratic_kernels.quadratic_attention(*arrays, **fields)
            if self.impl == 'pallas':
                return tpu_quadratic.quadratic_attention(*arrays, **fields, sequence_axis=sequence_axis)
            fields |= {'impl': self.impl, 'heads': self.num_heads, 'sequence_axis': sequence_axis}
            return quadratic_attention(*arrays, **fields)

        return attention_over_mesh(
            attend,
            *(q_BHNS, k_BHNS, v_BHNE),
            bias=self.bias_of_sequence(v_BHNE.shape[2]),
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=1 if self.impl in ('xla', 'pallas') else None,
        )

    def splash(self, q_BHNS: Array, k_BHNS: Array, v_BHNE: Array, tokens: TokenInfo) -> Array:
        """Returns the outputs [B, H, N, E], by a TPU's kernels; each device computes its own heads and queries."""
        head = ('batch', 'act_heads', 'length', None)

        def attend(*operands: Array | None, sequence_axis: str | None) -> Array:
            *arrays, ids_BN = operands
            fields = {'segment_ids_BN': ids_BN, 'sequence_axis': sequence_axis, 'interpret': pallas.interpreted()}
            return splash_attention(*arrays, causal=self.causal, **fields)

        return over_mesh(
            attend,
            *(q_BHNS, k_BHNS, v_BHNE, tokens.segment_ids_BN),
            axes=[head, head, head, ('batch', 'length')],
            result_like=2,
            token_multiple=1,
        )

    @property
    def has_cache_kernel(self) -> bool:
        """Whether a kernel computes the attention of single tokens to the cache (`gau.ops.kernels.decode_cache`)."""
        return (
            self.impl in ('triton', 'cudnn') and self.scoring.function in decode_cache.FUNCTIONS and launch.available()
        )

    def scaled(self, q: Array) -> Array:
        """Returns q times the learned temperature, if there is one."""
        return self.temperature_layer(q) if self.temperature == 'learned' else q

    def bias(self, n: int, queries_BT: Array | None = None) -> Array | None:
        """Returns b of every distance between n positions, [H, 2 n - 1], or b of given queries; None: no bias."""
        return None if self.relative_bias == 'none' else self.bias_layer(n, queries_BT)

    def gate_logits(self, x_BND: Array) -> Array | None:
        """Returns the logits of the state's gate for normalised inputs, [B, N, 1]; None: there is no gate."""
        return None

    def gate_parameters(self, inputs: int) -> tuple[Array, Array] | None:
        """Returns w and b of that gate for inputs of this width (`gau.layers.decay_gate`); None: there is no gate."""
        return None

    def bias_of_sequence(self, n: int) -> Array | None:
        """Returns the bias of every distance in a sequence of n tokens, [H, 2 n - 1]; None: no bias."""
        return self.bias(n)

    @property
    def gated_token_multiple(self) -> int | None:
        """For `gated` devices may share a sequence in multiples of so many tokens; None: each needs whole sequences."""
        return 1 if self.impl == 'pallas' else None

    def gated(
        self,
        p_BNW: Array,
        bias_2E: Array,
        *queries_keys: Array,
        bias_P: Array | None,
        gate_BN1: Array | None,
        segment_ids_BN: Array | None,
        sequence_axis: str | None,
    ) -> Array:
        """Returns U * (A V) of one head, [B, N, E], by kernels, from the projections of gate and values.

        Args:
          p_BNW: projections of gate and values, before bias and silu, in the first 2 E columns.
          bias_2E: their bias.
          *queries_keys: queries and keys of each of `pairs`, [B, N, S], scaled.
          bias_P: `bias_of_sequence` of the head, or None.
          gate_BN1: what `gate_logits` returns.
          segment_ids_BN: documents and padding, or None.
          sequence_axis: mesh axis over which the tokens are spread, inside `jax.shard_map`, or None.
        """
        fields = {
            'scoring': self.scoring,
            'causal': self.causal,
            'segment_ids_BN': segment_ids_BN,
            'bias_P': bias_P,
        }
        if self.impl == 'pallas':
            u_BNE, v_BNE = gate_and_values(p_BNW, bias_2E)
            arrays = *queries_keys, v_BNE
            return u_BNE * tpu_quadratic.quadratic_attention(*arrays, **fields, sequence_axis=sequence_axis)
        return gated_quadratic.gated_quadratic_attention(p_BNW, bias_2E, *queries_keys, **fields)

    def gated_with_state(
        self, *arrays: Array, bias_P: Array | None, gate_BN1: Array | None, tokens: TokenInfo
    ) -> Array:
        """Returns `gated` of the first tokens of sequences that are decoded; keys and values go into the state.

        Args:
          *arrays: those of `gated`.
          bias_P: see there.
          gate_BN1: see there.
          tokens: where they stand.
        """
        p_BNW, bias_2E, _, k_BNS = arrays
        _, v_BNE = gate_and_values(p_BNW, bias_2E)
        begin_quadratic_state(self, k_BNS[:, None], v_BNE[:, None])
        return self.gated(*arrays, bias_P=bias_P, gate_BN1=gate_BN1, segment_ids_BN=None, sequence_axis=None)
