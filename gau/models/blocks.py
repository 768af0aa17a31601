"""Blocks: layers with their norms, dropout and residual connections, made from a resolved config."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.attention import (
    CombinerAttention,
    LinformerAttention,
    MixedChunkAttention,
    MultiHeadAttention,
    PerformerAttention,
    QuadraticAttention,
)
from gau.layers.common import TokenInfo, constrain, param_dtype
from gau.layers.feed_forward import FeedForward
from gau.layers.gated_attention_unit import GatedAttentionUnit
from gau.layers.norm import Norm, Stream
from gau.models.architectures import ARCHITECTURES
from gau.models.config import expanded_dim, head_dim_at, heads_at
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
    def __call__(self, stream: Stream, tokens: TokenInfo, deterministic: bool) -> tuple[Stream, None]:
        """Returns the new residual stream, and None because `nn.scan` asks for a second result."""
        if ARCHITECTURES[self.config.name].family == 'gau':
            unit = gated_attention_unit(self.config, self.layer, self.causal)
            stream = self._residual(stream, lambda x: unit(x, tokens), 'norm', tokens, deterministic)
        else:
            attention = multi_head_attention(self.config, self.layer, self.causal)
            stream = self._residual(stream, lambda x: attention(x, tokens), 'attention_norm', tokens, deterministic)
            feed_forward = FeedForward(
                self.config.feed_forward, self.config.feed_forward_dim, self.config.dtype, name='feed_forward'
            )
            stream = self._residual(stream, feed_forward, 'feed_forward_norm', tokens, deterministic)
        return stream, None

    def _residual(self, stream, layer, norm_name, tokens, deterministic):
        norm = Norm(self.config.norm, self.config.dtype, self.config.impl, name=norm_name)
        h_BND = stream.x_BND
        if self.config.norm_placement == 'pre':
            stream, h_BND = norm(stream, tokens)
        y_BND, bias_D = layer(h_BND)
        if self.config.dropout_rate and not deterministic:
            y_BND = y_BND + bias_D.astype(y_BND.dtype)
            y_BND, bias_D = nn.Dropout(self.config.dropout_rate)(y_BND, deterministic=False), None
        stream = stream.plus(constrain(y_BND, 'batch', 'length', 'act_embed'), bias_D)
        if self.config.norm_placement == 'post':
            stream = Stream(norm(stream, tokens)[1])
        return stream._replace(x_BND=constrain(stream.x_BND, 'batch', 'length', 'act_embed'))


def first_stream(x_BND: Array, config) -> Stream:
    """Returns the stream that starts as x, its biases apart where a resolved config has the kernel that adds them."""
    apart = config.norm == 'scale_norm' and config.impl == 'triton' and config.norm_placement == 'pre'
    return Stream(x_BND, jnp.zeros(x_BND.shape[-1], param_dtype(config.dtype)) if apart else None)


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
