"""Blocks: layers with their norms, dropout and residual connections, made from a resolved config."""

import flax.linen as nn
from jax import Array

from gau.layers.attention import (
    CombinerAttention,
    LinformerAttention,
    MixedChunkAttention,
    MultiHeadAttention,
    PerformerAttention,
    QuadraticAttention,
)
from gau.layers.common import TokenInfo, constrain
from gau.layers.feed_forward import FeedForward
from gau.layers.gated_attention_unit import GatedAttentionUnit
from gau.layers.norm import Norm
from gau.models.architectures import ARCHITECTURES
from gau.models.config import expanded_dim, head_dim_at, heads_at
from gau.ops.masks import clear_padding
from gau.ops.scores import Scoring

ATTENTIONS = {
    'quadratic': QuadraticAttention,
    'mixed_chunk': MixedChunkAttention,
    'performer': PerformerAttention,
    'linformer': LinformerAttention,
    'combiner': CombinerAttention,
}


class Block(nn.Module):
    """A GAU, or attention and feed-forward, each in a residual connection.

    Attributes:
      config: resolved model config, frozen.
      layer: index of the block from 0; where layers are scanned, 0 stands for all.
      causal: whether later tokens are hidden.
    """

    config: object
    layer: int
    causal: bool

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo, deterministic: bool) -> tuple[Array, None]:
        """Returns the new residual stream, and None because `nn.scan` asks for a second result."""
        x_BND = clear_padding(x_BND, tokens.segment_ids_BN)
        if ARCHITECTURES[self.config.name].family == 'gau':
            unit = gated_attention_unit(self.config, self.layer, self.causal)
            x_BND = self._residual(x_BND, lambda x, _: unit(x, tokens), 'norm', deterministic)
        else:
            attention = multi_head_attention(self.config, self.layer, self.causal)
            x_BND = self._residual(x_BND, lambda x, _: attention(x, tokens), 'attention_norm', deterministic)
            feed_forward = FeedForward(
                self.config.feed_forward, self.config.feed_forward_dim, self.config.dtype, name='feed_forward'
            )
            x_BND = self._residual(x_BND, lambda x, _: feed_forward(x), 'feed_forward_norm', deterministic)
        return x_BND, None

    def _residual(self, x_BND, layer, norm_name, deterministic):
        norm = Norm(self.config.norm, self.config.dtype, self.config.impl, name=norm_name)
        h_BND = again_BND = x_BND
        if self.config.norm_placement == 'pre':
            x_BND, h_BND, again_BND = norm(x_BND)
        y_BND = layer(h_BND, again_BND)
        if self.config.dropout_rate:
            y_BND = nn.Dropout(self.config.dropout_rate)(y_BND, deterministic=deterministic)
        x_BND = x_BND + y_BND
        if self.config.norm_placement == 'post':
            _, x_BND, _ = norm(x_BND)
        return constrain(x_BND, 'batch', 'length', 'act_embed')


def gated_attention_unit(config, layer: int, causal: bool) -> GatedAttentionUnit:
    """Returns the GAU of a layer."""
    return GatedAttentionUnit(
        expanded_dim=expanded_dim(config),
        query_key_dim=config.query_key_dim,
        num_heads=heads_at(config, layer),
        **_attention_fields(config, causal),
        name='gau',
    )


def multi_head_attention(config, layer: int, causal: bool) -> MultiHeadAttention:
    """Returns the attention of a Transformer's layer."""
    return ATTENTIONS[ARCHITECTURES[config.name].attention](
        num_heads=heads_at(config, layer),
        head_dim=head_dim_at(config, layer),
        **_attention_fields(config, causal),
        name='attention',
    )


def _attention_fields(config, causal: bool) -> dict:
    """Fields of the config that the attention layers call by the same name, where they apply."""
    names = ('gate', 'temperature', 'relative_bias', 'relative_bias_length', 'impl', 'dtype')
    names += ('chunk_size', 'branches', 'global_reduction', 'gamma_init')
    names += ('feature_map', 'num_features', 'projection_rank', 'projection_length')
    fields = {name: config[name] for name in names if config[name] is not None}
    if config.attention_function is not None:
        fields['scoring'] = Scoring(config.attention_function, config.normalizer, config.normalizer_length or 512)
    return fields | {'rope': config.rope == 'rotary', 'causal': causal}
