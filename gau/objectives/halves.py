"""The second half of a passage from its first: pairs of a source and a target, for models that read both.

A row has the source in its first half and the target in its second (`gau.data.pairs`), and only the target counts. A
model with cross-attention encodes the one and predicts the other. Any other language model predicts the target without
a source, for in a row they are two documents: what the source is worth is what the former gains on it.
"""

from typing import Any

from ml_collections import ConfigDict

from gau.data.passes import Passes
from gau.models.families import cross
from gau.objectives.text import TextObjective


class Halves(TextObjective):
    """Every token of the second half of a passage, from those before it in that half, and the first half."""

    causal = True

    def __init__(self):
        """Makes the models that read a source known."""
        cross.register()

    @property
    def rows(self) -> Any:
        """How documents become rows."""
        from gau.data import pairs

        return pairs.HALVES

    def resolve_data(self, config: ConfigDict) -> ConfigDict:
        """See `gau.data.config.resolve` and `gau.data.pairs.resolve`."""
        from gau.data import pairs

        return pairs.resolve(super().resolve_data(config))

    def places_per_epoch(self, config: ConfigDict, tokenizer: Any) -> int:
        """A row for each passage, by one pass over the text."""
        from gau.data import counting, sources

        total = 0
        for documents in sources.open_split(config, 'train'):
            lengths = counting.lengths(documents, tokenizer, range(len(documents)))
            total += sum(-(-(length + 1) // config.context) for length in lengths if length)
        return total * config.context

    def passes(self, config: ConfigDict, places: int) -> dict[str, Passes]:
        """Nothing is known: how many rows the passages of a document fill, its manifest does not say."""
        del config, places
        return {}

    def build(self, config: ConfigDict, *, data: ConfigDict, tokenizer: Any, target: Any) -> Any:
        """Returns an encoder-decoder, or for a model without cross-attention a language model."""
        if not cross.reads_source(config):
            return super().build(config, data=data, tokenizer=tokenizer, target=target)
        from gau.models import encoder_decoder

        return encoder_decoder.build(config, vocab_size=tokenizer.vocab_size, target=target)

    def flops_per_token(self, config: ConfigDict, *, context: int, tokenizer: Any) -> float:
        """See `gau.models.counts`; an encoder-decoder scores half of the places of a row."""
        flops = super().flops_per_token(config, context=context, tokenizer=tokenizer)
        return flops - cross.reads_source(config) * config.model_dim * tokenizer.vocab_size
