"""Mixed chunk attention: FLASH, and MC-TFM++ in a Transformer."""

import math

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.pallas import pallas
from gau.models.attentions.record import ANYWHERE
from gau.models.attentions.scored import SCORING_FIELDS, ScoredAttention
from gau.models.attentions.triton import triton
from gau.models.costs import BYTES, Count, Shape, saved
from gau.models.fields import Field, Filler, choice, count, table, with_defaults

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
}


# Of a gated unit alone, of causal models, and not the paper's.
STATE_FIELDS = {
    'decay_gate': choice(
        'What the state of the global branch keeps when a chunk is added: all ("none"); or what a gate makes of the '
        'chunk, one number ("scalar").',
        *('none', 'scalar'),
        default='none',
    ),
    'local_window': count(
        'Chunks that the local branch reads, the own one included: 1 or 2. The global branch reads those before.',
        default=1,
    ),
    'far_chunks': Field(
        int,
        'Earlier chunks that the queries of a chunk read exactly, beside both branches: the one before, and those '
        'whose mean key fits best (gau/ops/far_chunks.py). 0: none.',
        0,
        wrong=(lambda value: value < 0, 'at least 0'),
    ),
}


class MixedChunk(ScoredAttention):
    """Quadratic attention inside chunks and linear attention between them, in a gated unit."""

    fields = SCORING_FIELDS | CHUNK_FIELDS | STATE_FIELDS
    implementations = table(
        triton=triton(gate='silu', branches='both'),
        pallas=pallas(longest_window=512, gate='silu', branches='both', far_chunks=0),
        xla=ANYWHERE,
        reference=ANYWHERE,
    )
    laptop = table(chunk_size=32)  # several chunks in a sequence, or the global branch would have nothing to do

    def core(self, config, *, heads, width, causal, impl):
        """See the base class."""
        from gau.layers.far_chunks import FarChunksCore
        from gau.layers.mixed_chunk import MixedChunkCore

        fields = self.core_fields(config, heads=heads, width=width)
        kind = MixedChunkCore
        if config.far_chunks:
            kind, fields = FarChunksCore, fields | {'far_chunks': config.far_chunks}
        return kind(
            causal=causal,
            impl=impl,
            dtype=config.dtype,
            **fields,
            pairs=self.pairs(config),
            chunk_size=config.chunk_size,
            global_reduction=config.global_reduction or 'mean',
            decay_gate=config.decay_gate or 'none',
            local_window=config.local_window or 1,
            parent=None,
        )

    def pairs(self, config: ConfigDict) -> tuple[str, ...]:
        """See the base class."""
        near = {'both': ('direct', 'linear'), 'local': ('direct',), 'global': ('linear',)}[config.branches]
        return (*near, 'far') if config.far_chunks else near

    def positions(self, config: ConfigDict, context: int) -> int:
        """See the base class."""
        return config.chunk_size * (config.local_window or 1)

    def idle_fields(self, config: ConfigDict) -> dict[str, str]:
        """See the base class."""
        idle = {}
        if config.branches == 'global':
            idle |= dict.fromkeys(SCORING_FIELDS, 'branches=global has no local branch')
        if config.branches == 'local':
            fields = {'global_reduction', *STATE_FIELDS} - {'local_window', 'far_chunks'}
            idle |= dict.fromkeys(fields, 'branches=local has no global branch')
        return idle | super().idle_fields(config)

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        for field, declared in (CHUNK_FIELDS | STATE_FIELDS).items():
            fill(field, declared.default)
        super().fill(fill, causal=causal, context=context)

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """See the base class."""
        super().check(config, causal=causal, context=context, chosen=chosen)
        changed = [name for name, field in STATE_FIELDS.items() if config[name] not in (None, field.default)]
        if changed and (not causal or config.num_heads > 1):
            raise UserError(f'model.{changed[0]}={config[changed[0]]} is of causal models with one head')
        if (config.local_window or 1) > 2:
            raise UserError(f'model.local_window must be 1 or 2, not {config.local_window}')
        if not causal or config.chunk_size < context:
            return
        alone = f'model.chunk_size={config.chunk_size} makes one chunk of a context of {context}'
        if config.branches == 'global':
            raise UserError(f'{alone}: branches=global would see nothing; use a smaller chunk_size or branches=both')
        for field in ('global_reduction', *STATE_FIELDS):
            if field in chosen:
                raise UserError(f'{alone}: {field}={config[field]} changes nothing; use a smaller chunk_size')

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """See the base class."""
        c, total = min(config.chunk_size, shape.context), Count()
        if config.branches != 'global':
            before = c if config.local_window == 2 and shape.context > c else 0
            seen = before + (c / 2 if causal else c)
            total += self.count_weights(config, shape, seen=seen, matrix=shape.heads * (c + before))
            total += self.count_scoring(config, shape, positions=c + before)
        if config.branches != 'local' and (shape.context > c or not causal):
            # One k v^T and one q M for every token; a state for every chunk.
            state = shape.heads * shape.width * shape.value_width
            total += Count(0, 4 * state, 0) + saved(config, 2 * state / c)
        if config.decay_gate == 'scalar':
            total += Count(config.model_dim + 1, 2 * (config.model_dim + 1), 0)
        if config.far_chunks:
            total += self._count_far(config, shape)
        return total

    def _count_far(self, config: ConfigDict, shape: Shape) -> Count:
        c = min(config.chunk_size, shape.context)
        chunks = math.ceil(shape.context / c)
        read = sum(min(before, config.far_chunks) for before in range(chunks)) / chunks
        # Every chunk is compared with half of the others; what it reads is saved, by XLA, and the weights are not.
        compared = Count(0, shape.heads * shape.width * chunks / c, 0)
        far = self.count_weights(config, shape, seen=c * read, matrix=0)
        return compared + far + saved(config, shape.heads * shape.value_width)

    def refuses_decoding(self, config: ConfigDict) -> str | None:
        """See the base class."""
        return None  # Its core has a state.

    def what_keeps_all_tokens(self, config: ConfigDict) -> str | None:
        """See the base class."""
        return f'model.far_chunks={config.far_chunks}' if (config.far_chunks or 0) > 1 else None

    def with_capacity(self, config: ConfigDict, state: dict, capacity: int) -> dict:
        """See the base class."""
        from gau.ops.far_decoding import with_chunks

        c = config.chunk_size
        return with_chunks(state, math.ceil(capacity / c), c) if self.what_keeps_all_tokens(config) else state

    def state_bytes(self, config: ConfigDict, shape: Shape) -> float:
        """See the base class."""
        c, chunks, size = config.chunk_size, config.local_window or 1, BYTES[config.dtype]
        keys, values, full = shape.heads * shape.width, shape.heads * shape.value_width, max(4, size)
        pairs = {'both': 2}.get(config.branches, 1)
        total = chunks * c * (pairs * keys + values) * size
        if config.branches != 'local':
            total += keys * shape.value_width * full
            if config.decay_gate == 'scalar':
                total += (chunks * c + 1) * full
        if config.far_chunks == 1:
            total += c * (2 * keys + values) * size
        elif config.far_chunks:
            far = math.ceil(shape.context / c)
            # Keys and values; their means and the sum of queries; which are read.
            total += far * c * (keys + values) * size + (far + 1) * keys * full + 4 * config.far_chunks
        return total

    def whole_blocks(self, config: ConfigDict, impl: str) -> str | None:
        """See the base class."""
        return 'chunk' if impl == 'triton' and not config.far_chunks else None

    def decodes_in_kernels(self, config: ConfigDict, impl: str) -> bool:
        """See the base class."""
        plain = config.attention_function == 'relu2' and config.temperature == 'none' and config.rope != 'local'
        return impl == 'triton' and plain and config.far_chunks != 1

    def reader_of_blocks(self, config: ConfigDict, *, short: bool, fresh: bool) -> str:
        """See the base class."""
        two, gated = config.local_window == 2, config.decay_gate == 'scalar'
        if short and (fresh or not two):
            return 'short'
        # Around training's kernels these would take dozens of small operations.
        return 'long' if two or gated else 'training'

    def window(self, config: ConfigDict) -> int | None:
        """See the base class."""
        # The state of one far chunk moves on where a chunk ends, in the middle of a window.
        return None if config.far_chunks == 1 else config.chunk_size

    def open_window(self, config: ConfigDict, state: dict, tokens: int) -> dict:
        """See the base class."""
        from gau.ops.chunk_window import open_window

        if self.window(config) is None:
            return state
        return open_window(state, tokens)

    def close_window(self, config, state, window, *, start_B, end_B):
        """See the base class."""
        from gau.ops.chunk_window import close_window

        if self.window(config) is None:
            return window
        fields = {'chunk_size': config.chunk_size, 'chunks': config.local_window or 1}
        return close_window(state, window, start_B=start_B, end_B=end_B, **fields)

    def shard_multiple(self, config: ConfigDict) -> int:
        """See the base class."""
        return config.chunk_size


class MultiHeadMixedChunk(MixedChunk):
    """The same in a Transformer, with softmax by default and without a relative bias."""

    fields = with_defaults(SCORING_FIELDS | CHUNK_FIELDS, attention_function='softmax', relative_bias='none') | {
        'gamma_init': choice(
            'Init of the scale of the linear queries and keys: N(0, 0.02), or ones, the default without local branch.',
            *('normal', 'ones'),
        )
    }
    implementations = table(xla=ANYWHERE, reference=ANYWHERE)

    def idle_fields(self, config: ConfigDict) -> dict[str, str]:
        """See the base class."""
        idle = super().idle_fields(config)
        if config.branches == 'local':
            idle['gamma_init'] = 'branches=local has no scale-and-offset transforms here'
        return idle

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        super().fill(fill, causal=causal, context=context)
        fill('gamma_init', 'ones' if fill.config.branches == 'global' else 'normal')
