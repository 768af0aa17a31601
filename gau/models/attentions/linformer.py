"""Linformer."""

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.attentions.record import Attention
from gau.models.costs import Count, Shape, saved
from gau.models.fields import Filler, count, table


class Linformer(Attention):
    """Attention to mixtures of the whole sequence."""

    fields = table(
        projection_rank=count('U, mixtures that a token attends to; default 256 or the context, the lesser.'),
        projection_length=count('Longest sequence; default the context.'),
    )
    not_causal = 'it mixes the whole sequence into every slot that a token attends to; train it as mlm'

    def core(self, config, *, heads, width, causal, impl):
        """See the base class."""
        from gau.layers.linformer import LinformerCore

        fields = {name: config[name] for name in self.fields}
        return LinformerCore(causal=causal, impl=impl, dtype=config.dtype, **fields, parent=None)

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        fill('projection_rank', min(256, context))
        fill('projection_length', context)

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """See the base class."""
        length = config.projection_length
        if length < context:
            raise UserError(f'model.projection_length={length} is too short for a context of {context}')

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """See the base class."""
        slots = shape.heads * config.projection_rank
        parameters = 2 * config.projection_length * config.projection_rank
        return Count(parameters, 8 * slots * shape.width, 0) + saved(config, 0, matrix=slots)
