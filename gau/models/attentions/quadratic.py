"""Quadratic attention: FLASH-Quad, and the Transformers with softmax."""

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.pallas import pallas
from gau.models.attentions.record import ANYWHERE, Needs
from gau.models.attentions.scored import SCORING_FIELDS, ScoredAttention
from gau.models.attentions.triton import triton
from gau.models.costs import BYTES, Count, Shape
from gau.models.fields import Filler, table, with_defaults
from gau.models.target import Target


class Quadratic(ScoredAttention):
    """Every query against every key that it sees, in a gated unit."""

    fields = SCORING_FIELDS
    implementations = table(
        triton=triton(attention_function=('relu2', 'softmax', 'softmax_plus')),
        pallas=pallas(widest=3072, attention_function='relu2'),
        xla=ANYWHERE,
        reference=ANYWHERE,
    )

    def core(self, config, *, heads, width, causal, impl):
        """See the base class."""
        from gau.layers.quadratic import QuadraticCore

        fields = self.core_fields(config, heads=heads, width=width)
        return QuadraticCore(causal=causal, impl=impl, dtype=config.dtype, **fields, parent=None)

    def positions(self, config: ConfigDict, context: int) -> int:
        """See the base class."""
        return context

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        if causal:
            fill('normalizer', 'fixed')
        super().fill(fill, causal=causal, context=context)

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """See the base class."""
        super().check(config, causal=causal, context=context, chosen=chosen)
        length = self.longest_decoded(config)
        if length is not None and length < context:
            raise UserError(f'model.relative_bias_length={length} is too short for a context of {context}')

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """See the base class."""
        context = shape.context
        # 'auto' may become any of the others, which are all linear in memory when sequences are long.
        kernels = config.impl in ('cudnn', 'splash', 'triton', 'pallas')
        linear = kernels or (config.impl != 'reference' and context > 1024)
        matrix = 0 if linear else shape.heads * context
        weights = self.count_weights(config, shape, seen=context / 2 if causal else context, matrix=matrix)
        return weights + self.count_scoring(config, shape, positions=context)

    def refuses_decoding(self, config: ConfigDict) -> str | None:
        """See the base class."""
        if config.normalizer == 'paper':
            return (
                'model.normalizer=paper cannot be decoded: it divides by the length of the whole sequence, so every '
                'token would change what was computed before; train with fixed, visible or su'
            )
        return None

    def what_keeps_all_tokens(self, config: ConfigDict) -> str:
        """See the base class."""
        return config.name

    def with_capacity(self, config: ConfigDict, state: dict, capacity: int) -> dict:
        """See the base class."""
        from gau.ops.decoding import with_places

        return state | {name: with_places(state[name], capacity) for name in ('k', 'v')}

    def state_bytes(self, config: ConfigDict, shape: Shape) -> float:
        """See the base class."""
        return shape.heads * shape.context * (shape.width + shape.value_width) * BYTES[config.dtype]

    def whole_blocks(self, config: ConfigDict, impl: str) -> str | None:
        """See the base class."""
        return 'sequence' if impl in ('triton', 'cudnn') else None

    def longest_decoded(self, config: ConfigDict) -> int | None:
        """See the base class."""
        return config.relative_bias_length if config.relative_bias == 'toeplitz' else None


def _cudnn(config: ConfigDict, target: Target) -> str | None:
    if target.platform != 'gpu':
        return f'a GPU, this is {target.platform}'
    if target.compute_capability is None or target.compute_capability < (8, 0):
        return 'an NVIDIA GPU of compute capability 8.0 or newer'
    for field, value in {'attention_function': 'softmax', 'relative_bias': 'none', 'dtype': 'bfloat16'}.items():
        if config[field] != value:
            return f'{field}={value}, not {config[field]}'
    # As wide as the kernels take them, less the columns that tell documents apart (`ops/kernels/cudnn_attention.py`).
    widest = (256 if target.compute_capability >= (9, 0) else 128) - 24
    if config.head_dim > widest or config.head_dim % 8:
        return f'heads of a width that is a multiple of 8 and at most {widest}, not {config.head_dim}'
    if target.sequence_shards > 1:
        return f'whole sequences on each device, not mesh.sequence={target.sequence_shards}'
    return None


def _splash(config: ConfigDict, target: Target) -> str | None:
    if target.platform != 'tpu' and not (target.platform == 'cpu' and target.pallas_interpreted):
        return f'a TPU, this is {target.platform}'
    for field, values in SPLASH_FIELDS.items():
        if config[field] not in values:
            return f'{field}={" or ".join(values)}, not {config[field]}'
    narrowest, widest = SPLASH_WIDTHS
    if not narrowest <= config.head_dim <= widest or config.head_dim % 8:
        return f'heads of a width that is a multiple of 8, {narrowest} to {widest}, not {config.head_dim}'
    return None


SPLASH_FIELDS = {'attention_function': ('softmax',), 'relative_bias': ('none',), 'dtype': ('bfloat16', 'float32')}
# Narrower heads fill less than half of a TPU's 128 lanes; wider ones have not been compiled.
SPLASH_WIDTHS = (64, 256)


class MultiHeadQuadratic(Quadratic):
    """The same in a Transformer, with softmax by default and without a relative bias."""

    fields = with_defaults(SCORING_FIELDS, attention_function='softmax', relative_bias='none')
    implementations = table(
        cudnn=Needs(_cudnn),
        splash=Needs(_splash, worth=lambda config, target: target.platform == 'tpu'),
        xla=ANYWHERE,
        reference=ANYWHERE,
    )
