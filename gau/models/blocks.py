"""Blocks: layers with their norms, dropout and residual connections, made from a resolved config."""

from typing import Any

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo, constrain
from gau.layers.norm import Norm
from gau.layers.short_convolution import ShortConvolution
from gau.models.architectures import ARCHITECTURES
from gau.models.target import Implementation


class Block(nn.Module):
    """The layers of a family (a GAU; attention and feed-forward), each in a residual connection.

    Attributes:
      config: resolved model config, frozen.
      layer: index of the block from 0; where layers are scanned, 0 stands for all.
      causal: whether later tokens are hidden.
      implementation: what the model is built with.
    """

    config: Any
    layer: int
    causal: bool
    implementation: Implementation

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo, deterministic: bool) -> tuple[Array, None]:
        """Returns the new residual stream, and None because `nn.scan` asks for a second result."""
        family, attention, _ = ARCHITECTURES[self.config.name]
        for norm_name, layer in family.layers(
            self.config,
            attention,
            layer=self.layer,
            causal=self.causal,
            implementation=self.implementation,
            decoding=not tokens.whole,
            decoding_kernels=tokens.decode is not None and tokens.decode.for_kernels,
        ):
            x_BND = self.residual(x_BND, norm_name, layer, tokens, deterministic)
        return x_BND, None

    def residual(self, x_BND: Array, norm_name: str, layer: nn.Module, tokens: TokenInfo, deterministic: bool) -> Array:
        """Returns x + f(norm(x)); norm(x + f(x)); or x + output_norm(f(norm(x))); f with its convolution."""
        placement = self.config.norm_placement
        norm = self._norm(norm_name)
        h_BND = self.convolved(x_BND if placement == 'post' else norm(x_BND), norm_name, tokens)
        y_BND = layer(h_BND, tokens)
        if placement == 'sandwich':
            y_BND = self._norm(norm_name.replace('norm', 'output_norm'))(y_BND)
        y_BND = constrain(self.dropout(y_BND, deterministic), 'batch', 'length', 'act_embed')
        x_BND = x_BND + y_BND.astype(x_BND.dtype)
        return constrain(norm(x_BND) if placement == 'post' else x_BND, 'batch', 'length', 'act_embed')

    def convolved(self, h_BND: Array, norm_name: str, tokens: TokenInfo) -> Array:
        """Returns what a layer reads: after a short convolution, where the model has it."""
        width = self.config.short_convolution
        if not width:
            return h_BND
        name = norm_name.replace('norm', 'short_convolution')
        return ShortConvolution(width, self.causal, self.config.dtype, name=name)(h_BND, tokens)

    def _norm(self, name: str) -> Norm:
        norm = nn.remat(Norm, prevent_cse=False) if self.implementation.norm == 'recomputed' else Norm
        return norm(self.config.norm, self.config.model_dim, self.config.dtype, name=name)

    def dropout(self, y_BND: Array, deterministic: bool) -> Array:
        """Returns y with dropout, where the model has it."""
        if deterministic or not self.config.dropout_rate:
            return y_BND
        return nn.Dropout(self.config.dropout_rate)(y_BND, deterministic=False)
