"""A token of each sequence, or a short block, in a gated attention unit in kernels, with its norm and its residual."""

import flax.linen as nn
import jax
from jax import Array

from gau.layers.common import TokenInfo, Weights
from gau.layers.gated_attention_unit import GatedAttentionUnit, ScaleOffset
from gau.layers.short_convolution import BEFORE, KeyShift
from gau.ops.chunk_window import FAR
from gau.ops.kernels.decode_chunks import Parameters, decode_gated_chunks
from gau.ops.kernels.prefill_chunks import prefill_gated_chunks


class DecodeGatedAttentionUnit(GatedAttentionUnit):
    """A `GatedAttentionUnit` around mixed chunk attention with relu2, both branches and one head, with a state.

    Its state may have a gate, and, of single tokens, several far chunks.

    See `gau.ops.kernels.decode_chunks` for a token in a window, `gau.ops.kernels.prefill_chunks` for a block.
    """

    @nn.compact
    def __call__(self, x_BTD: Array, tokens: TokenInfo, norm_scale: Array) -> Array:
        """Returns x + GAU(ScaleNorm(x)), [B, T, D].

        Args:
          x_BTD: the residual stream.
          tokens: what the layers of one call share; of single tokens the state is a window (`gau.ops.chunk_window`).
          norm_scale: the parameter of ScaleNorm.
        """
        e, s, core = self.expanded_dim, self.query_key_dim, self.core
        uv_D2E, uv_bias_2E = Weights((2, e), ('embed',), (None, 'expanded'), self.dtype, name='uv')(x_BTD)
        z_DS, z_bias_S = Weights((s,), ('embed',), ('query_key',), self.dtype, name='z')(x_BTD)
        gamma_RS, beta_RS = self.scale_offset(_Parameters)(s)
        like_o = jax.ShapeDtypeStruct((e,), self.dtype)
        out_ED, out_bias_D = Weights((x_BTD.shape[-1],), ('expanded',), ('embed',), self.dtype, name='out')(like_o)
        bias_HP = core.bias(core.spec.window * core.chunk_size)
        parameters = Parameters(
            *(norm_scale, uv_D2E, uv_bias_2E, z_DS, z_bias_S, gamma_RS, beta_RS, out_ED, out_bias_D),
            None if bias_HP is None else bias_HP[0],
        )
        shift = _KeyShiftState(self.dtype, name='key_shift') if self.key_input == 'shifted' else None
        if shift is not None:
            mix_S, before_BS = shift(s)
            parameters = parameters._replace(mix_S=mix_S)
        gated = core.decay_gate != 'none'
        if gated:
            w_D1, bias_1 = core.gate_parameters(x_BTD.shape[-1])
            parameters = parameters._replace(gate_D=w_D1[:, 0], gate_bias=bias_1)
        table = tokens.rope[s] if self.rope == 'rotary' else None
        fields = {'position': tokens.decode, 'spec': core.spec}
        in_window = tokens.decode.opened_B is not None
        names = 'k', 'k_lin', 'v', 'sum', *(('gate', 'count') if gated else ()), *(('arrivals',) if in_window else ())
        state = {name: core.get_variable('cache', name)[:, 0] for name in names}
        # Without an axis of heads.
        far_names = FAR if 'far' in core.pairs else ()
        state |= {name: core.get_variable('cache', name) for name in far_names}
        if shift is not None:
            state[BEFORE] = before_BS
        if in_window:
            table = None if table is None else tuple(x_B1h[:, 0] for x_B1h in table)
            y_BD, state = decode_gated_chunks(x_BTD[:, 0], parameters, table, state, **fields)
            y_BTD = y_BD[:, None]
        else:
            y_BTD, state = prefill_gated_chunks(x_BTD, parameters, table, state, **fields)
        for name in names:
            core.put_variable('cache', name, state[name][:, None])
        for name in far_names:
            core.put_variable('cache', name, state[name])
        if shift is not None:
            shift.put_variable('cache', BEFORE, state[BEFORE][:, None])
        return y_BTD


class _KeyShiftState(KeyShift):
    """The parameter of a `KeyShift` and its state while single tokens are decoded."""

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array]:
        """Returns m, [S], and Z of the token before in each row, [B, S]."""
        return self.mix(width), self.get_variable('cache', BEFORE)[:, 0]


class _Parameters(ScaleOffset):
    """The parameters of a `ScaleOffset` of one head."""

    @nn.compact
    def __call__(self, width: int) -> list[Array]:
        """Returns gamma and beta, [R, S] each."""
        return [parameter[:, 0] for parameter in self.parameters(width)]
