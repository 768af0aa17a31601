"""The models by name, and the sizes: a new architecture is a new entry here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from gau.models.attentions.combiner import Combiner
from gau.models.attentions.linformer import Linformer
from gau.models.attentions.mixed_chunk import MixedChunk, MultiHeadMixedChunk
from gau.models.attentions.performer import Performer
from gau.models.attentions.quadratic import MultiHeadQuadratic, Quadratic
from gau.models.attentions.record import Attention
from gau.models.families.gated_unit import GatedUnit
from gau.models.families.record import Family
from gau.models.families.transformer import Transformer
from gau.models.fields import COMMON, Field, with_defaults


class Architecture(NamedTuple):
    """One model: an attention in the layers of a family.

    Attributes:
      family: record of the layers around the attention.
      attention: record of the attention.
      defaults: defaults of the model that differ from those of the records.
    """

    family: Family
    attention: Attention
    defaults: Mapping[str, Any] = MappingProxyType({})

    @property
    def not_causal(self) -> str | None:
        """None, or why the model cannot be causal."""
        return self.attention.not_causal

    @property
    def fields(self) -> dict[str, Field]:
        """Every field that applies to the model, with its default; the others are refused where somebody sets them."""
        return with_defaults({**COMMON, **self.family.fields, **self.attention.fields}, **self.defaults)


# A dict, not a view: `ARCHITECTURES['name'] = Architecture(...)` registers a model from anywhere.
ARCHITECTURES = {
    'flash_quad': Architecture(GatedUnit(), Quadratic()),
    'flash': Architecture(GatedUnit(), MixedChunk()),
    'transformer': Architecture(Transformer(), MultiHeadQuadratic(), {'feed_forward': 'gelu', 'rope': 'none'}),
    'transformer_plus': Architecture(Transformer(), MultiHeadQuadratic(), {'feed_forward': 'gelu'}),
    'transformer_plus_plus': Architecture(Transformer(), MultiHeadQuadratic()),
    'mc_transformer_plus_plus': Architecture(Transformer(), MultiHeadMixedChunk()),
    'performer': Architecture(Transformer(), Performer()),
    'linformer': Architecture(Transformer(), Linformer()),
    'combiner': Architecture(Transformer(), Combiner()),
}


class Size(NamedTuple):
    """A size that all models come in, with about as many parameters: two GAU layers for one Transformer layer.

    Attributes:
      model_dim: D.
      gau_layers: layers of FLASH and FLASH-Quad; Transformers have half as many.
      parameters: parameters of named models with a tied vocabulary of 32,000 (FLASH-Quad with the rotary bias it has
        beyond a context of 512). 'tiny' has 1 M beside its embedding, 'base' is the paper's 110 M and 'large' the 500 M
        it trained on PG-19. A test checks the numbers against the closed form and the built models.
    """

    model_dim: int
    gau_layers: int
    parameters: dict[str, int]


# The FLASH that reached the lowest loss here, which recipe=best of configs/common.py gives and docs/tpu_v4_64.md
# compiles (docs/results/quality_shifted.md): keys that are found by the token before them, the chunk before the own one
# read exactly, a state that forgets. The last two are of causal models with several chunks. FLASH by its name alone is
# the paper's.
BEST_FLASH = MappingProxyType({'key_input': 'shifted', 'chunk_size': 128, 'local_window': 2, 'decay_gate': 'scalar'})
SIZES = MappingProxyType(
    {
        'tiny': Size(192, 4, {'flash_quad': 7_134_470, 'flash': 7_137_538, 'transformer_plus_plus': 7_034_625}),
        'small': Size(384, 12, {'flash_quad': 23_528_462, 'flash': 23_537_666, 'transformer_plus_plus': 22_938_625}),
        'base': Size(768, 24, {'flash_quad': 111_983_642, 'flash': 112_002_050, 'transformer_plus_plus': 109_644_289}),
        'large': Size(
            1536, 32, {'flash_quad': 508_702_754, 'flash': 508_727_298, 'transformer_plus_plus': 502_492_161}
        ),
    }
)
