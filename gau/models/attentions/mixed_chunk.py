"""Mixed chunk attention: FLASH, and MC-TFM++ in a Transformer."""

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.pallas import pallas
from gau.models.attentions.record import ANYWHERE
from gau.models.attentions.scored import SCORING_FIELDS, ScoredAttention
from gau.models.attentions.triton import triton
from gau.models.costs import Count, Shape, saved
from gau.models.fields import Filler, choice, count, number, table, with_defaults

CHUNK_FIELDS = {
    'chunk_size': count('C, tokens in a chunk.', default=256),
    'branches': choice(
        '"local": attention inside chunks; "global": linear attention to the chunks before, or to all tokens where '
        'the model is bidirectional; or both.',
        *('both', 'local', 'global'),
        default='both',
    ),
    'global_reduction': choice(
        'What the global branch reads: the mean or the sum over the visible tokens.', 'mean', 'sum', default='mean'
    ),
    'global_decay': number(
        'Factor on the weight of a token in that mean or sum for every chunk between it and the query; 1: none.',
        default=1.0,
        wrong=lambda value: not 0 < value <= 1,
        right='above 0 and at most 1',
    ),
}


class MixedChunk(ScoredAttention):
    """Quadratic attention inside chunks and linear attention between them, in a gated unit."""

    fields = SCORING_FIELDS | CHUNK_FIELDS
    implementations = table(
        triton=triton(gate='silu', branches='both'),
        pallas=pallas(at_most={'chunk_size': 512}, gate='silu', branches='both'),
        xla=ANYWHERE,
        reference=ANYWHERE,
    )
    laptop = table(chunk_size=32)  # several chunks in a sequence, or the global branch would have nothing to do

    def core(self, config, *, heads, width, causal, impl):
        """See the base class."""
        from gau.layers.mixed_chunk import MixedChunkCore

        fields = self.core_fields(config, heads=heads, width=width)
        return MixedChunkCore(
            causal=causal,
            impl=impl,
            dtype=config.dtype,
            **fields,
            pairs=self.pairs(config),
            chunk_size=config.chunk_size,
            global_reduction=config.global_reduction or 'mean',
            global_decay=config.global_decay or 1.0,
            parent=None,
        )

    def pairs(self, config: ConfigDict) -> tuple[str, ...]:
        """See the base class."""
        return {'both': ('direct', 'linear'), 'local': ('direct',), 'global': ('linear',)}[config.branches]

    def positions(self, config: ConfigDict, context: int) -> int:
        """See the base class."""
        return config.chunk_size

    def void(self, config: ConfigDict) -> dict[str, str]:
        """See the base class."""
        void = {}
        if config.branches == 'global':
            void |= dict.fromkeys(SCORING_FIELDS, 'branches=global has no local branch')
        if config.branches == 'local':
            void |= dict.fromkeys(('global_reduction', 'global_decay'), 'branches=local has no global branch')
        return void | super().void(config)

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        for field, declared in CHUNK_FIELDS.items():
            fill(field, declared.default)
        super().fill(fill, causal=causal, context=context)

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """See the base class."""
        super().check(config, causal=causal, context=context, chosen=chosen)
        if not causal and (config.global_decay or 1) < 1:
            raise UserError(
                f'model.global_decay={config.global_decay} is of causal models: all chunks are read at once here'
            )
        if not causal or config.chunk_size < context:
            return
        alone = f'model.chunk_size={config.chunk_size} makes one chunk of a context of {context}'
        if config.branches == 'global':
            raise UserError(f'{alone}: branches=global would see nothing; use a smaller chunk_size or branches=both')
        for field in ('global_reduction', 'global_decay'):
            if field in chosen:
                raise UserError(f'{alone}: {field}={config[field]} changes nothing; use a smaller chunk_size')

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """See the base class."""
        c, total = min(config.chunk_size, shape.context), Count()
        if config.branches != 'global':
            total += self.count_weights(config, shape, seen=c / 2 if causal else c, matrix=shape.heads * c)
            total += self.count_scoring(config, shape, positions=c)
        if config.branches != 'local' and (shape.context > c or not causal):
            # One k v^T and one q M for every token; a state for every chunk.
            state = shape.heads * shape.width * shape.value_width
            total += Count(0, 4 * state, 0) + saved(config, 2 * state / c)
        return total

    def refuses_decoding(self, config: ConfigDict) -> None:
        """See the base class."""
        return None  # Its core has a state.

    def whole_blocks(self, config: ConfigDict, impl: str) -> str | None:
        """See the base class."""
        return 'chunk' if impl == 'triton' and self._known_to_decoding_kernels(config) else None

    def decodes_in_kernels(self, config: ConfigDict, impl: str) -> bool:
        """See the base class."""
        plain = config.attention_function == 'relu2' and config.temperature == 'none'
        return impl == 'triton' and plain and self._known_to_decoding_kernels(config)

    def _known_to_decoding_kernels(self, config: ConfigDict) -> bool:
        """Whether fields that kernels of prefill and decoding have not heard of say what they would without them."""
        known = SCORING_FIELDS.keys() | CHUNK_FIELDS.keys()
        others = {name: field.default for name, field in self.fields.items() if name not in known}
        return all(config[name] in (None, default) for name, default in others.items())

    def window(self, config: ConfigDict) -> int:
        """See the base class."""
        return config.chunk_size

    def open_window(self, config: ConfigDict, state: dict, tokens: int) -> dict:
        """See the base class."""
        from gau.ops.chunk_window import open_window

        return open_window(state, tokens)

    def close_window(self, config, state, window, *, start_B, end_B):
        """See the base class."""
        from gau.ops.chunk_window import close_window

        fields = {'chunk_size': config.chunk_size, 'decay': config.global_decay or 1.0}
        return close_window(state, window, start_B=start_B, end_B=end_B, **fields)

    def shard_multiple(self, config: ConfigDict) -> int:
        """See the base class."""
        return config.chunk_size


class MultiHeadMixedChunk(MixedChunk):
    """The same in a Transformer, with softmax by default and without a relative bias."""

    fields = with_defaults(MixedChunk.fields, attention_function='softmax', relative_bias='none') | {
        'gamma_init': choice(
            'Init of the scale of the linear queries and keys: N(0, 0.02), or ones, the default without local branch.',
            *('normal', 'ones'),
        )
    }
    implementations = table(xla=ANYWHERE, reference=ANYWHERE)

    def void(self, config: ConfigDict) -> dict[str, str]:
        """See the base class."""
        void = super().void(config)
        if config.branches == 'local':
            void['gamma_init'] = 'branches=local has no scale-and-offset transforms here'
        return void

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        super().fill(fill, causal=causal, context=context)
        fill('gamma_init', 'ones' if fill.config.branches == 'global' else 'normal')
