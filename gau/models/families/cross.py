"""Encoder-decoders: a family whose decoder also reads a source, with a Cross-GAU or multi-head cross-attention.

A row of N places is a source in its first half and a target in its second (`gau.models.encoder_decoder`). Block l of
the model is block l of the encoder and block l of the decoder; where the decoder reads the source, it does so after its
own attention, as often as a Transformer of this depth: in every block of a Transformer, in every second one of a gated
unit. A Cross-GAU has E = D, so that with its four large matrices it is about as large as multi-head cross-attention.

These models belong to two objectives and to nobody else: `register` makes them known, and who does not ask for them has
neither their names nor their fields.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES, Architecture
from gau.models.attentions.mixed_chunk import MixedChunk
from gau.models.attentions.quadratic import MultiHeadQuadratic
from gau.models.attentions.record import Attention
from gau.models.costs import Count, layer_inputs, linear, norm, saved
from gau.models.families.gated_unit import GatedUnit
from gau.models.families.record import Family
from gau.models.families.transformer import HEAD_DIM, Transformer
from gau.models.fields import Filler, choice, count, table

CROSS_FIELDS = table(
    cross_unit=choice(
        'What reads the source: "gau": a Cross-GAU, "multi_head": multi-head cross-attention. Default: that of the '
        'family.',
        *('gau', 'multi_head'),
    ),
    cross_heads=count('Heads of it; by default 1 of a Cross-GAU, D / 64 of the other.'),
    cross_function=choice(
        'Its weights: relu(q.k / sqrt(S) + b)^2 / keys (default of a Cross-GAU) or softmax (default of the other).',
        *('relu2', 'softmax'),
    ),
    # At the start a softmax over the source gives all places of a target the same vector, and a bidirectional encoder
    # of softmax all places of a source. Beside either an embedding of N(0, 0.02) is small (docs/results/cross.md).
    embedding_scale=choice(
        'Factor on the embeddings that both stacks begin with: "width": sqrt(D), as in the first Transformer; or '
        '"none".',
        *('none', 'width'),
        default='none',
    ),
)
# S of a Cross-GAU in a Transformer; a gated unit has its own.
QUERY_KEY_DIM = 128


class ReadsSource(Family):
    """Mixin for the record of a family: what it has besides in an encoder-decoder.

    Attributes:
      own_unit: `cross_unit` by default.
    """

    own_unit: str

    def reads_source(self, layer: int) -> bool:
        """Returns whether a block of the decoder reads the source."""
        return layer % self.blocks_for_two_units == 0

    def layers(self, config, attention, *, layer, causal, **built) -> Iterator:
        """See the base class; the decoder is what is causal."""
        from gau.layers.cross_attention import CrossGatedAttentionUnit, CrossMultiHeadAttention
        from gau.ops.scores import Scoring

        own = super().layers(config, attention, layer=layer, causal=causal, **built)
        yield next(own)
        if causal and self.reads_source(layer):
            scoring = Scoring('softmax', None) if config.cross_function == 'softmax' else Scoring('relu2', 'su')
            d, heads = config.model_dim, config.cross_heads
            if config.cross_unit == 'gau':
                widths = {'expanded_dim': d, 'query_key_dim': config.query_key_dim or QUERY_KEY_DIM}
                unit = CrossGatedAttentionUnit(
                    num_heads=heads, scoring=scoring, dtype=config.dtype, name='cross', **widths
                )
            else:
                unit = CrossMultiHeadAttention(heads, d // heads, scoring, config.dtype, name='cross')
            yield 'cross_norm', unit
        yield from own

    def count(self, config: ConfigDict, attention: Attention, *, layer: int, context: int, causal: bool) -> Count:
        """Returns what block `layer` of encoder and decoder costs, for each of `context` places, half of them each's.

        The encoder's last norm and the factor of its sinusoid are counted with its first block.
        """
        half, total = max(1, context // 2), Count()
        for decoder in (False, True):
            total += super().count(config, attention, layer=layer, context=half, causal=decoder)
        if self.reads_source(layer):
            total += self._count_cross(config, half)
        if layer == 0:
            total += Count(config.absolute_position == 'sinusoid')
            total += norm(config) if config.norm_placement != 'post' else Count()
        return Count(total.parameters, total.flops / 2, total.activation_bytes / 2)

    def _count_cross(self, config: ConfigDict, half: int) -> Count:
        """Returns what reading the source costs, for one token of the target and one of the source."""
        d, heads = config.model_dim, config.cross_heads
        if config.cross_unit == 'gau':
            s = config.query_key_dim or QUERY_KEY_DIM
            total = linear(d, d) + linear(d, s) + linear(d, d) + linear(d, s) + linear(d, d) + Count(4 * heads * s)
            # Before and after silu, queries and keys, attention's output and the gated one.
            numbers, width = 4 * d + 4 * s + 2 * heads * s + 2 * d, heads * s
        else:
            total, numbers, width = linear(d, d) + linear(d, 2 * d) + linear(d, d), 4 * d, d
        total += Count(heads * (config.cross_function == 'relu2'))
        total += Count(0, 2 * half * (width + d)) + saved(config, numbers, matrix=heads * half)
        return layer_inputs(config) + total

    def fill(self, fill: Filler) -> None:
        """See the base class."""
        super().fill(fill)
        fill('cross_unit', self.own_unit)
        gated = fill.config.cross_unit == 'gau'
        fill('cross_heads', 1 if gated else max(1, fill.config.model_dim // HEAD_DIM))
        fill('cross_function', 'relu2' if gated else 'softmax')

    def check(self, config: ConfigDict) -> None:
        """See the base class."""
        super().check(config)
        if config.model_dim % config.cross_heads:
            raise UserError(f'model.cross_heads={config.cross_heads} does not divide model_dim = {config.model_dim}')
        if config.layer_stack == 'scan' and self.blocks_for_two_units > 1:
            raise UserError(f'model.layer_stack=scan needs layers that are alike: {config.name} reads in every second')
        if (config.short_convolution or 0) % 2:
            raise UserError(f'model.short_convolution={config.short_convolution} must be even: the encoder has it too')

    def leaves_bias_to_norm(self, config: ConfigDict, impl: str) -> bool:
        """See the base class."""
        return False


class CrossGatedUnit(ReadsSource, GatedUnit):
    """x + GAU(norm(x)), and in every second block of the decoder x + cross(norm(x), source)."""

    fields = table(**GatedUnit.fields, **CROSS_FIELDS)
    own_unit = 'gau'


class CrossTransformer(ReadsSource, Transformer):
    """x + attention(norm(x)), x + cross(norm(x), source) in the decoder, x + feed_forward(norm(x))."""

    fields = table(**Transformer.fields, **CROSS_FIELDS)
    own_unit = 'multi_head'


class OfHalves(Attention):
    """Mixin for the record of an attention: encoder and decoder each have one half of a row."""

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        super().fill(fill, causal=causal, context=max(1, context // 2))

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """See the base class; both the encoder's side and the decoder's."""
        if not causal:
            raise UserError(f'model.name={config.name} reads a source: train it with objective=halves or titles')
        for side in (False, True):
            super().check(config, causal=side, context=max(1, context // 2), chosen=chosen)

    def refuses_decoding(self, config: ConfigDict) -> str:
        """See the base class."""
        return f'{config.name} cannot be decoded: no decoding state holds the source that its tokens read'

    def shard_multiple(self, config: ConfigDict) -> int:
        """See the base class."""
        return 2 * super().shard_multiple(config)


class MixedChunkOfHalves(OfHalves, MixedChunk):
    """FLASH's attention."""


class MultiHeadQuadraticOfHalves(OfHalves, MultiHeadQuadratic):
    """The Transformer's."""


def register() -> None:
    """Adds the models `cross_flash` and `cross_transformer_plus_plus`."""
    ARCHITECTURES['cross_flash'] = Architecture(CrossGatedUnit(), MixedChunkOfHalves())
    ARCHITECTURES['cross_transformer_plus_plus'] = Architecture(CrossTransformer(), MultiHeadQuadraticOfHalves())


def reads_source(config: ConfigDict) -> bool:
    """Returns whether a resolved config is of a model that reads a source."""
    return isinstance(ARCHITECTURES[config.name].family, ReadsSource)
