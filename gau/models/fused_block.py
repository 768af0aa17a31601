"""The block where a kernel has the residual stream, its norm and the biases of the layers (`gau.layers.fused_norm`)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.common import TokenInfo, constrain, param_dtype
from gau.layers.decode_unit import DecodeGatedAttentionUnit
from gau.layers.fused_norm import FusedScaleNorm, Residual
from gau.models.blocks import Block


class FusedBlock(Block):
    """A `Block` for pre-norm and kernels: its stream is a `Residual`, or an array where single tokens are decoded."""

    def residual(
        self, x: Residual | Array, norm_name: str, layer: nn.Module, tokens: TokenInfo, deterministic: bool
    ) -> Residual | Array:
        """Returns x + f(norm(x)); a `Residual` takes the bias of f into its own."""
        in_one = isinstance(layer, DecodeGatedAttentionUnit)
        if not isinstance(x, Residual) and not in_one:
            return super().residual(x, norm_name, layer, tokens, deterministic)
        norm = FusedScaleNorm(self.config.norm, self.config.model_dim, self.config.dtype, name=norm_name)
        if in_one:
            return layer(x, tokens, norm.scale)
        # After a convolution the layer reads something else than the norm's result.
        gate = None if self.config.short_convolution else layer.gate_of_norm(self.config.model_dim)
        down_D, bias_1 = gate or (None, None)
        x, h_BND, logit_BN1 = norm.of_residual(x, down_D)
        gate_BN1 = None if gate is None else logit_BN1 + bias_1
        y_BND, bias_D = layer.without_bias(self.convolved(h_BND, norm_name, tokens), tokens, gate_BN1)
        if self.config.dropout_rate and not deterministic:
            y_BND, bias_D = self.dropout(y_BND + bias_D.astype(y_BND.dtype), deterministic), None
        x = x.plus(constrain(y_BND, 'batch', 'length', 'act_embed'), bias_D)
        return x._replace(x_BND=constrain(x.x_BND, 'batch', 'length', 'act_embed'))


def first_residual(x_BND: Array, dtype: str) -> Residual:
    """Returns the stream x before any layer: it has no biases yet."""
    return Residual(x_BND, jnp.zeros(x_BND.shape[-1], param_dtype(dtype)))
