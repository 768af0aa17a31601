"""One token of each sequence in a gated attention unit, in kernels, with its norm and its residual connection."""

import flax.linen as nn
import jax
from jax import Array

from gau.layers.common import TokenInfo, Weights
from gau.layers.gated_attention_unit import GatedAttentionUnit, ScaleOffset
from gau.ops.kernels.decode_chunks import Parameters, decode_gated_chunks


class DecodeGatedAttentionUnit(GatedAttentionUnit):
    """A `GatedAttentionUnit` around mixed chunk attention with relu2, both branches and one head, in a window.

    See `gau.ops.kernels.decode_chunks`.
    """

    @nn.compact
    def __call__(self, x_B1D: Array, tokens: TokenInfo, norm_scale: Array) -> Array:
        """Returns x + GAU(ScaleNorm(x)), [B, 1, D].

        Args:
          x_B1D: the residual stream.
          tokens: what the layers of one call share; the state is a window (`gau.ops.chunk_window`).
          norm_scale: the parameter of ScaleNorm.
        """
        e, s, core = self.expanded_dim, self.query_key_dim, self.core
        uv_D2E, uv_bias_2E = Weights((2, e), ('embed',), (None, 'expanded'), self.dtype, name='uv')(x_B1D)
        z_DS, z_bias_S = Weights((s,), ('embed',), ('query_key',), self.dtype, name='z')(x_B1D)
        gamma_RS, beta_RS = self.scale_offset(_Parameters)(s)
        like_o = jax.ShapeDtypeStruct((e,), self.dtype)
        out_ED, out_bias_D = Weights((x_B1D.shape[-1],), ('expanded',), ('embed',), self.dtype, name='out')(like_o)
        bias_HP = core.bias(core.chunk_size)
        parameters = Parameters(
            *(norm_scale, uv_D2E, uv_bias_2E, z_DS, z_bias_S, gamma_RS, beta_RS, out_ED, out_bias_D),
            None if bias_HP is None else bias_HP[0],
        )
        table = tuple(x_B1h[:, 0] for x_B1h in tokens.rope[s]) if self.rope == 'rotary' else None
        names = 'k', 'k_lin', 'v', 'sum', 'arrivals'
        window = {name: core.get_variable('cache', name)[:, 0] for name in names}
        y_BD, window = decode_gated_chunks(
            x_B1D[:, 0], parameters, table, window, position=tokens.decode, spec=core.spec
        )
        for name in names:
            core.put_variable('cache', name, window[name][:, None])
        return y_BD[:, None]


class _Parameters(ScaleOffset):
    """The parameters of a `ScaleOffset` of one head."""

    @nn.compact
    def __call__(self, width: int) -> list[Array]:
        """Returns gamma and beta, [R, S] each."""
        return [parameter[:, 0] for parameter in self.parameters(width)]
