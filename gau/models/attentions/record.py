"""What the rest of the house asks of an attention: a new one is a subclass in its file, and an `Architecture`."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from gau.models.costs import Count, Shape
from gau.models.fields import Field, Filler
from gau.models.target import Target

if TYPE_CHECKING:
    from jax import Array

    from gau.layers.core import AttentionCore


class Needs(NamedTuple):
    """What an implementation needs.

    Attributes:
      lacks: returns what it needs that config or target lack ("a GPU, this is cpu"), or None.
      worth: returns whether 'auto' may take it, where it works.
    """

    lacks: Callable[[ConfigDict, Target], str | None]
    worth: Callable[[ConfigDict, Target], bool] = lambda config, target: True


ANYWHERE = Needs(lambda config, target: None)


class Attention:
    """The record of an attention. The base class answers for the simplest one; a subclass overrides what differs.

    Attributes:
      fields: its own fields of the config.
      implementations: the implementations of its core and what each needs, fastest first: 'auto' takes the first that
        works.
      not_causal: None, or why it cannot be causal.
      laptop: values of fields with which a short sequence uses every part of it (`configs.common.run_local`).
    """

    fields: Mapping[str, Field] = {}
    implementations: Mapping[str, Needs] = {'xla': ANYWHERE, 'reference': ANYWHERE}
    not_causal: str | None = None
    laptop: Mapping[str, Any] = {}

    def core(self, config: ConfigDict, *, heads: int, width: int, causal: bool, impl: str) -> 'AttentionCore':
        """Returns the core of a layer, with parent=None: the layer adopts it. No other method imports JAX.

        Args:
          config: resolved model config.
          heads: H.
          width: S (K) of the queries and keys.
          causal: whether later tokens are hidden.
          impl: a name of `implementations`.
        """
        raise NotImplementedError

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """Returns what the core costs (see `gau.models.counts`)."""
        raise NotImplementedError

    def pairs(self, config: ConfigDict) -> tuple[str, ...]:
        """Returns the pairs of queries and keys that the core takes (`gau.layers.core.AttentionCore.pairs`)."""
        return ('direct',)

    def idle_fields(self, config: ConfigDict) -> dict[str, str]:
        """Returns the fields of an unresolved config that do nothing beside its others, each with the reason."""
        return {}

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """Sets the open fields whose defaults depend on other fields."""

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """Raises UserError where fields of a resolved config contradict each other.

        `chosen` are the fields that somebody set; none, if the config had been resolved before.
        """

    def refuses_decoding(self, config: ConfigDict) -> str | None:
        """Returns why a causal model with it cannot be decoded; None: its core has a state (`gau.layers.state`)."""
        return f'{config.name} cannot be decoded: its attention has no decoding state'

    def what_keeps_all_tokens(self, config: ConfigDict) -> str | None:
        """Returns what makes the decoding state grow with the text, a model or `model.FIELD=VALUE`; None: nothing."""
        return None

    def with_capacity(self, config: ConfigDict, state: dict, capacity: int) -> dict:
        """Returns a layer's decoding state with room for `capacity` tokens, if it keeps all tokens; else as it is."""
        return state

    def state_bytes(self, config: ConfigDict, shape: Shape) -> float | None:
        """Returns the bytes of one layer's decoding state for one sequence; None: unknown."""
        return None

    def whole_blocks(self, config: ConfigDict, impl: str) -> str | None:
        """Returns where a block of a prompt must begin so that training's implementation can read it.

        'chunk': at the beginning of a chunk; 'sequence': at the first token; None: it cannot read blocks at all.
        """
        return None

    def decodes_in_kernels(self, config: ConfigDict, impl: str) -> bool:
        """Returns whether kernels decode the single tokens of a gated unit (`gau.layers.decode_unit`)."""
        return False

    def reader_of_blocks(self, config: ConfigDict, *, short: bool, fresh: bool) -> str:
        """Returns which kernels read the blocks of a prompt where kernels decode tokens (`DecodePosition.reader`).

        Args:
          config: resolved model config.
          short: whether the prompts are short.
          fresh: whether the prompt is one block and the states before it are empty.
        """
        return 'training'

    def window(self, config: ConfigDict) -> int | None:
        """Returns how many single tokens a window takes until `close_window` is due; None: it needs no window."""
        return None

    def open_window(self, config: ConfigDict, state: dict, tokens: int) -> dict:
        """Returns a layer's state as a window with room for `tokens` single tokens (`gau.ops.chunk_window`)."""
        return state

    def close_window(self, config: ConfigDict, state: dict, window: dict, *, start_B: 'Array', end_B: 'Array') -> dict:
        """Returns the state after a window that was opened at positions start_B and now stands at end_B."""
        return window

    def longest_decoded(self, config: ConfigDict) -> int | None:
        """Returns the longest sequence that can be decoded, in tokens; None: any."""
        return None

    def shard_multiple(self, config: ConfigDict) -> int:
        """Returns m: devices that share the tokens of a sequence must hold a multiple of m tokens each."""
        return 1
