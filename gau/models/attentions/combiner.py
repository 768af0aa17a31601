"""Combiner."""

import math

from ml_collections import ConfigDict

from gau.models.attentions.record import ANYWHERE, Attention
from gau.models.costs import Count, Shape, saved
from gau.models.fields import Filler, count, table


class Combiner(Attention):
    """Attention factorised over rows and columns."""

    fields = table(
        chunk_size=count('C, tokens in a row; default the power of two at or above sqrt(context).'),
    )
    implementations = table(reference=ANYWHERE)

    def core(self, config, *, heads, width, causal, impl):
        """See the base class."""
        from gau.layers.combiner import CombinerCore

        return CombinerCore(causal=causal, impl=impl, dtype=config.dtype, chunk_size=config.chunk_size, parent=None)

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """See the base class."""
        # Rows are as long as there are rows, in powers of two.
        fill('chunk_size', 2 ** math.ceil(math.log2(context) / 2))

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """See the base class."""
        h, k, c = shape.heads, shape.width, min(config.chunk_size, shape.context)
        rows = math.ceil(shape.context / c)
        # Row and summaries (scores and values of both), three matmuls of columns, the mean of the queries and keys.
        half = 0.5 if causal else 1
        flops = 4 * h * k * c * half + 4 * h * k * c + 8 * h * k * rows * half
        return Count(0, flops, 0) + saved(config, 3 * h * k, matrix=h * (2 * c + 2 * rows))

    def refuses_decoding(self, config: ConfigDict) -> str | None:
        """See the base class."""
        return (
            'combiner cannot be decoded: a summary of its columns is weighted by the mean of all their queries, so '
            'each new row changes the weights of all earlier tokens, and the state would be the whole sequence'
        )
