"""From columns of tokens to rows of one length, in Grain's packers."""

from collections.abc import Callable

import grain
from ml_collections import ConfigDict

from gau.data import examples

# Rows filled together by first-fit packing at least; more rows leave less padding.
BINS = 64


def pack(
    dataset: grain.IterDataset,
    config: ConfigDict,
    *,
    seed: int | None,
    bins: int,
) -> grain.IterDataset:
    """Rows of `context` tokens; `seed` shuffles the rows that first-fit fills together (None: in order)."""
    length = {'tokens': config.context}
    if config.packing == 'concat':
        return grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct=length)
    dataset = grain.experimental.FlatMapIterDataset(dataset, _Pieces(examples.pieces(config.context)))
    if config.packing == 'document':
        return dataset.map(examples.padded_row(config.context))
    return grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct=length,
        num_packing_bins=max(BINS, bins),
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )


class _Pieces(grain.experimental.FlatMapTransform):
    """One document to many pieces, in Grain's terms."""

    def __init__(self, cut: Callable[[examples.Columns], list[examples.Columns]]) -> None:
        self._cut = cut

    def flat_map(self, element: examples.Columns) -> list[examples.Columns]:
        """Returns the pieces of a document."""
        return self._cut(element)
