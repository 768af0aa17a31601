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
    """The record of an attention, with the answers of one that is plain; subclasses override what differs.

    Attributes:
      fields: those of the config that belong to it.
      implementations: what each implementation of its core needs, fastest first: 'auto' takes the first that works.
      not_causal: None, or why it cannot be causal.
      laptop: values of fields that show all of it in a short sequence (`configs.common.run_local`).
    """

    fields: Mapping[str, Field] = {}
    implementations: Mapping[str, Needs] = {'xla': ANYWHERE, 'reference': ANYWHERE}
    not_causal: str | None = None
    laptop: Mapping[str, Any] = {}

    def core(self, config: ConfigDict, *, heads: int, width: int, causal: bool, impl: str) -> 'AttentionCore':
        """Returns the core of a layer, with parent=None: the layer adopts it. Only here JAX is imported.

        Args:
          config: resolved model config.
          heads: H of the layer.
          width: S (K), of its queries and keys.
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

    def void(self, config: ConfigDict) -> dict[str, str]:
        """Returns its fields that another field of an unresolved config takes the meaning from, with the reason."""
        return {}

    def fill(self, fill: Filler, *, causal: bool, context: int) -> None:
        """Sets its fields whose defaults depend on others."""

    def check(self, config: ConfigDict, *, causal: bool, context: int, chosen: frozenset[str]) -> None:
        """Raises UserError for a resolved config that does not go together.

        `chosen` names the fields that somebody set; it is empty where the config had been resolved before.
        """

    def refuses_decoding(self, config: ConfigDict) -> str | None:
        """Returns why a causal model with it cannot be decoded; None: its core has a state (`gau.layers.state`)."""
        return f'{config.name} cannot be decoded: its attention has no decoding state'

    def what_keeps_all_tokens(self, config: ConfigDict) -> str | None:
        """Returns what its decoding state grows by with the sequence ("flash_quad", a field); None: it has one size."""
        return None

    def with_capacity(self, config: ConfigDict, state: dict, capacity: int) -> dict:
        """Returns a layer's decoding state with room for so many tokens, where it keeps all of them."""
        return state

    def state_bytes(self, config: ConfigDict, shape: Shape) -> float | None:
        """Returns the bytes of its decoding state in one layer for one sequence; None: nobody has said."""
        return None

    def whole_blocks(self, config: ConfigDict, impl: str) -> str | None:
        """Returns where a row must stand for an implementation to read a block of a prompt as training would.

        'chunk': where a chunk begins; 'sequence': before its first token; None: it never does, the reference does.
        """
        return None

    def decodes_in_kernels(self, config: ConfigDict, impl: str) -> bool:
        """Returns whether a gated unit decodes single tokens in kernels (`gau.layers.decode_unit`)."""
        return False

    def reader_of_blocks(self, config: ConfigDict, *, short: bool, fresh: bool) -> str:
        """Returns what reads blocks of a prompt where tokens are decoded in kernels (`DecodePosition.reader`).

        Args:
          config: of the model.
          short: whether the prompts are short.
          fresh: whether there is one block, from empty states.
        """
        return 'training'

    def window(self, config: ConfigDict) -> int | None:
        """Returns the most single tokens that are decoded before `close_window`; None: any number, without a window."""
        return None

    def open_window(self, config: ConfigDict, state: dict, tokens: int) -> dict:
        """Returns a layer's decoding state, opened for so many single tokens; see `gau.ops.chunk_window`."""
        return state

    def close_window(self, config: ConfigDict, state: dict, window: dict, *, start_B: 'Array', end_B: 'Array') -> dict:
        """Returns the state after the tokens of its window, from its positions at the start to those at the end."""
        return window

    def longest_decoded(self, config: ConfigDict) -> int | None:
        """Returns the most tokens that a decoded sequence may have, or None."""
        return None

    def shard_multiple(self, config: ConfigDict) -> int:
        """Returns of how many tokens a device must hold a multiple, where devices share the tokens of a sequence."""
        return 1
