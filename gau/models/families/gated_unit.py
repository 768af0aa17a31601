"""FLASH and FLASH-Quad: one gated attention unit a block."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.record import Attention
from gau.models.costs import BYTES, Count, Shape, input_state, layer_inputs, linear, saved
from gau.models.families.record import Family
from gau.models.fields import Filler, choice, count, number, table
from gau.models.target import Implementation
from gau.models.widths import check_even, check_heads, expanded_dim


class GatedUnit(Family):
    """x + GAU(norm(x))."""

    fields = table(
        expansion_factor=number('E / D.', default=2.0, wrong=lambda value: not value > 0, right='positive'),
        query_key_dim=count('S.', default=128),
        gate=choice('U; "none" leaves plain attention.', 'silu', 'none', default='silu'),
        key_input=choice(
            'What the keys are transforms of: the Z of the queries ("shared"); Z mixed with that of the token before, '
            'column by column ("shifted"); a projection of their own ("own").',
            *('shared', 'shifted', 'own'),
            default='shared',
        ),
        gamma_init=choice(
            'Init of the scale of queries and keys: N(0, 0.02), or ones, which is the default where there is no '
            'relative bias: the layer would be dead otherwise (docs/paper.md section 7, trap 2).',
            *('normal', 'ones'),
        ),
    )

    def layers(self, config, attention, *, layer, causal, implementation, decoding, decoding_kernels=False) -> Iterator:
        """See the base class."""
        from gau.layers.decode_unit import DecodeGatedAttentionUnit
        from gau.layers.fused_unit import FusedGatedAttentionUnit, PallasGatedAttentionUnit
        from gau.layers.gated_attention_unit import GatedAttentionUnit

        impl, heads = implementation.attention, config.num_heads
        kernels = {'triton': FusedGatedAttentionUnit, 'pallas': PallasGatedAttentionUnit}
        fused = impl in kernels and config.gate == 'silu' and not decoding
        unit = kernels[impl] if fused else GatedAttentionUnit
        if decoding_kernels and self.decodes_in_kernels(config, attention, implementation):
            unit = DecodeGatedAttentionUnit
        yield (
            'norm',
            unit(
                attention.core(config, heads=heads, width=config.query_key_dim, causal=causal, impl=impl),
                expanded_dim=expanded_dim(config),
                query_key_dim=config.query_key_dim,
                num_heads=heads,
                gate=config.gate,
                gamma_init=config.gamma_init,
                rope=config.rope,
                key_input=config.key_input or 'shared',
                dtype=config.dtype,
                name='gau',
            ),
        )

    def count(self, config: ConfigDict, attention: Attention, *, layer: int, context: int, causal: bool) -> Count:
        """See the base class."""
        d, e, s, h = config.model_dim, expanded_dim(config), config.query_key_dim, config.num_heads
        gate, roles = config.gate == 'silu', 2 * len(attention.pairs(config))
        total = (
            layer_inputs(config) + linear(d, (1 + gate) * e) + linear(d, s) + linear(e, d) + Count(roles * 2 * h * s)
        )
        # Before and after silu, the roles, attention's output, and the gated output.
        total += saved(config, 2 * (1 + gate) * e + 2 * s + roles * h * s + (1 + gate) * e)
        if config.key_input == 'own':
            total += linear(d, s) + saved(config, 2 * s)
        elif config.key_input == 'shifted':
            total += Count(s) + saved(config, s)
        return total + attention.count(config, Shape(h, s, e / h, context), causal=causal)

    def state_bytes(self, config: ConfigDict, attention: Attention, *, context: int) -> float | None:
        """See the base class."""
        s, h = config.query_key_dim, config.num_heads
        own = attention.state_bytes(config, Shape(h, s, expanded_dim(config) / h, context))
        shifted = s * BYTES[config.dtype] if config.key_input == 'shifted' else 0
        return None if own is None else own + shifted + input_state(config)

    def decodes_in_kernels(self, config: ConfigDict, attention: Attention, implementation: Implementation) -> bool:
        """See the base class."""
        plain = not config.short_convolution and config.key_input != 'own'
        impl = implementation.attention
        return plain and implementation.norm == 'triton' and attention.decodes_in_kernels(config, impl)

    def rope_widths(self, config: ConfigDict) -> set[int]:
        """See the base class."""
        return {config.query_key_dim}

    def fill(self, fill: Filler) -> None:
        """See the base class."""
        fill('norm', 'scale_norm')
        fill('num_heads', 1)
        fill('gamma_init', 'ones' if fill.config.relative_bias in (None, 'none') else 'normal')

    def check(self, config: ConfigDict) -> None:
        """See the base class."""
        expanded = config.expansion_factor * config.model_dim
        if abs(expanded - round(expanded)) > 1e-6:
            raise UserError(
                f'model.expansion_factor={config.expansion_factor} times model_dim={config.model_dim} is '
                f'{expanded:g}; it must be a whole number'
            )
        check_heads(config, 'E = expansion_factor * model_dim', round(expanded))
        check_even(config, 'query_key_dim', config.query_key_dim)

    def leaves_bias_to_norm(self, config: ConfigDict, impl: str) -> bool:
        """See the base class."""
        return impl == 'triton' and config.gate == 'silu'
