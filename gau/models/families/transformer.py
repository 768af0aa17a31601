"""The Transformers: attention and feed-forward a block."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.record import Attention
from gau.models.costs import Count, Shape, input_state, layer_inputs, linear, saved
from gau.models.families.record import Family
from gau.models.fields import Filler, choice, count, table
from gau.models.widths import check_even

# Width of a head where a model says nothing else.
HEAD_DIM = 64


class Transformer(Family):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    fields = table(
        head_dim=count('K; default D / H.'),
        gate=choice('"silu": a gate on the output of attention, as in a GAU.', 'silu', 'none', default='none'),
        feed_forward=choice(
            'GEGLU; GELU in transformer and transformer_plus (recalled).', 'gelu', 'geglu', 'swiglu', default='geglu'
        ),
        feed_forward_dim=count('Inner width; default 4 D for GELU and 8/3 D for the gated ones.'),
    )
    blocks_for_two_units = 1

    def layers(self, config, attention, *, layer, causal, implementation, decoding, decoding_kernels=False) -> Iterator:
        """See the base class."""
        from gau.layers.feed_forward import FeedForward
        from gau.layers.multi_head import MultiHeadAttention

        heads, width, impl = config.num_heads, config.head_dim, implementation.attention
        yield (
            'attention_norm',
            MultiHeadAttention(
                attention.core(config, heads=heads, width=width, causal=causal, impl=impl),
                num_heads=heads,
                head_dim=width,
                gate=config.gate,
                gamma_init=config.gamma_init,
                rope=config.rope,
                dtype=config.dtype,
                name='attention',
            ),
        )
        feed_forward = FeedForward(config.feed_forward, config.feed_forward_dim, config.dtype, name='feed_forward')
        yield 'feed_forward_norm', feed_forward

    def count(self, config: ConfigDict, attention: Attention, *, layer: int, context: int, causal: bool) -> Count:
        """See the base class."""
        d, h, k = config.model_dim, config.num_heads, config.head_dim
        gate = config.gate == 'silu'
        total = layer_inputs(config) + linear(d, 3 * h * k) + linear(h * k, d)
        if gate:
            total += linear(d, h * k)
        total += saved(config, (3 + 1 + 3 * gate) * h * k)
        if 'linear' in attention.pairs(config):
            total += Count(4 * h * k) + saved(config, 2 * h * k)
        total += attention.count(config, Shape(h, k, k, context), causal=causal)

        e, gated = config.feed_forward_dim, config.feed_forward != 'gelu'
        total += layer_inputs(config) + linear(d, (1 + gated) * e) + linear(e, d)
        return total + saved(config, (2 + 2 * gated) * e)

    def state_bytes(self, config: ConfigDict, attention: Attention, *, context: int) -> float | None:
        """See the base class."""
        own = attention.state_bytes(config, Shape(config.num_heads, config.head_dim, config.head_dim, context))
        return None if own is None else own + 2 * input_state(config)

    def rope_widths(self, config: ConfigDict) -> set[int]:
        """See the base class."""
        return {config.head_dim}

    def fill(self, fill: Filler) -> None:
        """See the base class."""
        config = fill.config
        fill('norm', 'layer_norm')
        fill('num_heads', max(1, config.model_dim // HEAD_DIM))
        fill('feed_forward', fill.defaults['feed_forward'])
        fill('feed_forward_dim', 4 * config.model_dim if config.feed_forward == 'gelu' else 8 * config.model_dim // 3)
        if config.head_dim is None:
            if config.model_dim % config.num_heads:
                raise UserError(
                    f'model.num_heads={config.num_heads} does not divide model.model_dim={config.model_dim}'
                )
            fill('head_dim', config.model_dim // config.num_heads)

    def check(self, config: ConfigDict) -> None:
        """See the base class."""
        check_even(config, 'head_dim', config.head_dim)
