"""What the rest of the house asks of a family of models: the layers around the attention."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from gau.models.attentions.record import Attention
from gau.models.costs import Count
from gau.models.fields import Field, Filler
from gau.models.target import Implementation

if TYPE_CHECKING:
    import flax.linen as nn


class Family:
    """The record of a family; subclasses override what they answer otherwise.

    Attributes:
      fields: its own fields of the config, beside `gau.models.fields.COMMON`.
      blocks_for_two_units: how many of its blocks are as large as two gated units.
    """

    fields: Mapping[str, Field] = {}
    blocks_for_two_units: int = 2

    def layers(
        self,
        config: ConfigDict,
        attention: Attention,
        *,
        layer: int,
        causal: bool,
        implementation: Implementation,
        decoding: bool,
        decoding_kernels: bool = False,
    ) -> Iterator[tuple[str, 'nn.Module']]:
        """Yields (name of its norm, layer) for each layer of a block; a layer is called with (x_BND, tokens).

        Args:
          config: resolved model config.
          attention: record of the attention.
          layer: index of the block from 0.
          causal: whether later tokens are hidden.
          implementation: what the model is built with.
          decoding: whether tokens are decoded in a way that training's kernels cannot compute.
          decoding_kernels: whether kernels of decoding may take it (`DecodePosition.for_kernels`).
        """
        raise NotImplementedError

    def decodes_in_kernels(self, config: ConfigDict, attention: Attention, implementation: Implementation) -> bool:
        """Returns whether kernels decode single tokens, and perhaps short prompts (`gau.layers.decode_unit`)."""
        return False

    def count(self, config: ConfigDict, attention: Attention, *, layer: int, context: int, causal: bool) -> Count:
        """Returns what a block costs (see `gau.models.counts`)."""
        raise NotImplementedError

    def state_bytes(self, config: ConfigDict, attention: Attention, *, context: int) -> float | None:
        """Returns the bytes of a block's decoding state for one sequence of `context` tokens; None: unknown."""
        return None

    def rope_widths(self, config: ConfigDict) -> set[int]:
        """Returns the widths of the queries and keys that its layers rotate."""
        raise NotImplementedError

    def idle_fields(self, config: ConfigDict) -> dict[str, str]:
        """See `gau.models.attentions.record.Attention.idle_fields`."""
        return {}

    def fill(self, fill: Filler) -> None:
        """Sets the open fields whose defaults depend on other fields; those of the attention are set already."""

    def check(self, config: ConfigDict) -> None:
        """Raises UserError where fields of a resolved config contradict each other."""

    def leaves_bias_to_norm(self, config: ConfigDict, impl: str) -> bool:
        """Returns whether the layers have `without_bias`, so that the next norm's kernel can add their bias."""
        return False
