"""The gated attention unit in kernels: parameters of `GatedAttentionUnit`, and its results up to rounding.

U, V and Z come from one matmul where no device has a part of them; bias, silu, scale, offset and RoPE of the queries
and keys are one kernel, and activations, attention and gate another operation (`gau.ops.kernels`). The bias of the last
projection may be left to the kernel of the next norm (`gau.layers.fused_norm`). So it is on a GPU; on a TPU kernels are
fewer (`PallasGatedAttentionUnit`). The same in plain JAX, to read:
`gau.ops.queries_keys`, `gau.ops.gated_mixed_chunk`, and `gated_quadratic_attention` in `gau.ops.quadratic_attention`.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.common import Linear, TokenInfo, Weights
from gau.layers.gated_attention_unit import GatedAttentionUnit, ScaleOffset
from gau.layers.sharding import over_mesh, parts_of
from gau.layers.short_convolution import KeyMix
from gau.ops.kernels.queries_keys import queries_and_keys
from gau.ops.short_convolution import follows


class FusedGatedAttentionUnit(GatedAttentionUnit):
    """GAU(x) of whole sequences in kernels, for units with a gate and one head; `core.gated` is the attention."""

    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies the unit to normalised inputs."""
        y_BND, bias_D = self.without_bias(x_BND, tokens)
        return y_BND + bias_D.astype(y_BND.dtype)

    def gate_of_norm(self, inputs: int) -> tuple[Array, Array] | None:
        """Returns w [inputs] and b [1] of the core's gate x w + b, for the kernel that makes x; None: no gate."""
        parameters = self.core.gate_parameters(inputs)
        if parameters is None:
            return None
        w_D1, bias_1 = parameters
        return w_D1[:, 0].astype(self.dtype), bias_1

    @nn.compact
    def without_bias(self, x_BND: Array, tokens: TokenInfo, gate_BN1: Array | None = None) -> tuple[Array, Array]:
        """Returns GAU(x) less its last bias, [B, N, D], and this bias [D].

        Args:
          x_BND: normalised inputs.
          tokens: what the layers of one call share.
          gate_BN1: logits of the core's gate, if the kernel that made x has made them too; None: they are made here.

        Raises:
          ValueError: no gate, several heads, or a block of a sequence that is decoded.
        """
        if self.gate != 'silu' or self.num_heads != 1 or not tokens.whole:
            raise ValueError('the fused unit takes whole sequences, with a gate and one head')
        e, s = self.expanded_dim, self.query_key_dim
        gate_BN1 = self.core.gate_logits(x_BND) if gate_BN1 is None else gate_BN1
        uv_D2E, bias_2E = Weights((2, e), ('embed',), (None, 'expanded'), self.dtype, name='uv')(x_BND)
        if self.key_input == 'own' or (self.key_input == 'shifted' and tokens.decode is not None):
            queries_keys, p = self.plain_queries_keys(x_BND, tokens), self.project(x_BND, uv_D2E)
            return self.output(self.attend(p, bias_2E, queries_keys, tokens, gate_BN1), x_BND.shape[-1])
        z_DS, bias_S = Weights((s,), ('embed',), ('query_key',), self.dtype, name='z')(x_BND)
        mix_S = KeyMix(self.dtype, name='key_shift')(s) if self.key_input == 'shifted' else None
        scale_offset = functools.partial(self.scale_offset(FusedScaleOffset), tokens=tokens, mix_S=mix_S)
        if parts_of('act_expanded') == 1:
            # One matmul: its gradient for x needs no second pass to add two of them up.
            joined_DW = jnp.concatenate([uv_D2E.reshape(len(uv_D2E), -1), z_DS], axis=1)
            queries_keys, p = scale_offset(x_BND @ joined_DW, bias_S)
        else:
            # U and V are cut over devices, Z is not.
            queries_keys, _ = scale_offset(x_BND @ z_DS, bias_S)
            p = jnp.tensordot(x_BND, uv_D2E, axes=1)
        return self.output(self.attend(p, bias_2E, queries_keys, tokens, gate_BN1), x_BND.shape[-1])

    def plain_queries_keys(self, x_BND: Array, tokens: TokenInfo) -> tuple[Array, ...]:
        """Returns queries and keys, [B, N, S] each, without a kernel."""
        queries_keys = self.scale_offset(ScaleOffset)(*self.of_queries_and_keys(x_BND, tokens), tokens=tokens)
        return tuple(x_BHNS[:, 0] for x_BHNS in queries_keys)

    def project(self, x_BND: Array, uv_D2E: Array) -> Array:
        """Returns the projections of gate and values, for `attend`."""
        if parts_of('act_expanded') == 1:
            # Without a dimension of 2, which a TPU would pad.
            uv_D2E = uv_D2E.reshape(len(uv_D2E), -1)
        return jnp.tensordot(x_BND, uv_D2E, axes=1)

    def output(self, o_BNE: Array, width: int) -> tuple[Array, Array]:
        """Returns the output projection of U * (A V) without its bias, [B, N, width], and the bias."""
        out_ED, bias_D = Weights((width,), ('expanded',), ('embed',), self.dtype, name='out')(o_BNE)
        return jnp.tensordot(o_BNE.astype(self.dtype), out_ED, axes=1), bias_D

    def attend(
        self, p: Array, bias_2E: Array, queries_keys: tuple[Array, ...], tokens: TokenInfo, gate_BN1: Array | None
    ) -> Array:
        """Returns U * (A V), [B, N, E], on every device for its own sequences and its own part of E.

        Args:
          p: projections [B, N, W] with those of gate and values in the first 2 E columns; or [B, N, 2, E].
          bias_2E: their bias.
          queries_keys: arrays [B, N, S].
          tokens: what the layers of one call share.
          gate_BN1: logits of the core's gate, or None.
        """
        bias_HP = self.core.bias_of_sequence(p.shape[1])

        def op(p, *operands, sequence_axis):
            *arrays, gate_BN1, bias_P, segment_ids_BN = operands
            p_BNW = p.reshape(*p.shape[:2], -1)
            fields = {'bias_P': bias_P, 'segment_ids_BN': segment_ids_BN, 'sequence_axis': sequence_axis}
            return self.core.gated(p_BNW, *arrays, gate_BN1=gate_BN1, **fields)

        q_BNS, *others = queries_keys
        if tokens.decode is not None:
            bias_P = None if bias_HP is None else bias_HP[0]
            arrays = p.reshape(*p.shape[:2], -1), bias_2E, self.core.scaled(q_BNS), *others
            return self.core.gated_with_state(*arrays, bias_P=bias_P, gate_BN1=gate_BN1, tokens=tokens)
        by_token = ('batch', 'length', None)
        columns = (None,) if p.ndim == 3 else (None, 'act_expanded')
        return over_mesh(
            op,
            *(p, bias_2E, self.core.scaled(q_BNS), *others, gate_BN1),
            None if bias_HP is None else bias_HP[0],
            tokens.segment_ids_BN,
            axes=[
                ('batch', 'length', *columns),
                (None, columns[-1]),
                *[by_token] * (len(queries_keys) + 1),
                (None,),
                ('batch', 'length'),
            ],
            result_like=0,
            result_axes=('batch', 'length', columns[-1]),
            token_multiple=self.core.gated_token_multiple,
        )


class PallasGatedAttentionUnit(FusedGatedAttentionUnit):
    """The same for a TPU, where activations, attention and gate are kernels and the rest is the compiler's."""

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies the unit to normalised inputs."""
        e = self.expanded_dim
        uv_D2E, bias_2E = Weights((2, e), ('embed',), (None, 'expanded'), self.dtype, name='uv')(x_BND)
        queries_keys = self.plain_queries_keys(x_BND, tokens)
        p, gate_BN1 = self.project(x_BND, uv_D2E), self.core.gate_logits(x_BND)
        o_BNE = self.attend(p, bias_2E, queries_keys, tokens, gate_BN1)
        return Linear((x_BND.shape[-1],), ('expanded',), ('embed',), self.dtype, name='out')(o_BNE)


class FusedScaleOffset(ScaleOffset):
    """A `ScaleOffset` of one head, with the bias and silu before it in the same kernel."""

    @nn.compact
    def __call__(
        self, p_BNW: Array, bias_S: Array, *, tokens: TokenInfo, mix_S: Array | None = None
    ) -> tuple[tuple[Array, ...], Array]:
        """Returns R arrays [B, N, S] made of the last S columns of p, and p itself.

        Whoever reads other columns must read the p that is returned: the gradients of all then share one buffer.

        See `gau.ops.kernels.queries_keys`; `mix_S` is the parameter of a `KeyShift`, or None.
        """
        gamma_RS, beta_RS = (parameter[:, 0] for parameter in self.parameters(bias_S.size))
        table = tokens.rope[bias_S.size] if self.rotated else (None, None)

        follows_BN = None if mix_S is None else follows(tokens.segment_ids_BN, p_BNW.shape[:2])

        def op(p_BNW, bias_S, gamma_RS, beta_RS, cos_BNh, sin_BNh, mix_S, follows_BN, *, sequence_axis):
            del sequence_axis  # Every token by itself, or the sequence is whole.
            table = None if cos_BNh is None else (cos_BNh, sin_BNh)
            shift = None if mix_S is None else (mix_S, follows_BN)
            return queries_and_keys(p_BNW, bias_S, gamma_RS, beta_RS, table, shift, rotated=self.rotated)

        by_token = ('batch', 'length', None)
        return over_mesh(
            op,
            *(p_BNW, bias_S, gamma_RS, beta_RS, *table, mix_S, follows_BN),
            axes=[by_token, (None,), (None, None), (None, None), by_token, by_token, (None,), ('batch', 'length')],
            result_like=0,
            token_multiple=1 if mix_S is None else None,
        )
