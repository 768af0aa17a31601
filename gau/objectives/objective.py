"""What every objective says: the one place that the rest of the house asks what a run is trained for.

A new one is one file with a subclass of `Objective` (or of `gau.objectives.text.TextObjective`, if it reads documents),
and its name in `config.objective`. Loop, checkpoints, meshes, evaluators and commands go on from there.
"""

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from ml_collections import ConfigDict

from gau import lookup
from gau.data.passes import Passes

Batch = dict[str, np.ndarray]


class TrainBatches(Protocol):
    """The endless batches of training, or the rows of them that a process needs (`gau.data.streams.Streams`)."""

    rows: Sequence[int]
    rows_read: int
    batch_size: int

    def __next__(self) -> Batch:
        """Returns the next batch's rows."""

    def get_state(self) -> dict[str, Any]:
        """Returns where it stands, small and JSON-able, by names that are unique among processes."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken."""

    def close(self) -> None:
        """Lets go of threads and files."""


class Objective(abc.ABC):
    """What a model is trained for.

    In a batch every array has the rows as its first axis, and `weights` says how much each target counts.

    Attributes:
      causal: whether a token's output must not depend on later ones.
      evaluator: type of the evaluator that the config's entry `eval` is of, unless it says another.
      targets: what the sum of the weights is called in metrics.jsonl.
      metrics: names of what `loss` returns beside the loss.
    """

    causal: ClassVar[bool]
    evaluator: ClassVar[str]
    targets: ClassVar[str] = 'tokens'
    metrics: ClassVar[Sequence[str]] = ()

    # What a batch holds. `config` is the section `data`, resolved.

    @abc.abstractmethod
    def resolve_data(self, config: ConfigDict) -> ConfigDict:
        """Returns the section `data` made whole and checked. Raises UserError."""

    @abc.abstractmethod
    def tokenizer(self, config: ConfigDict) -> Any:
        """Returns the tokenizer (`gau.data.tokenizers.Tokenizer`); other data may have something with `fingerprint`."""

    @abc.abstractmethod
    def identity(self, config: ConfigDict) -> dict[str, str]:
        """Returns what tells whether the data changed, by source."""

    @abc.abstractmethod
    def check_split(self, config: ConfigDict, split: str) -> None:
        """Raises UserError unless `split` exists and holds something."""

    @abc.abstractmethod
    def places_per_epoch(self, config: ConfigDict, tokenizer: Any) -> int:
        """Returns how many places of rows, of `config.context` each, one pass over the training data takes."""

    def passes(self, config: ConfigDict, places: int) -> dict[str, Passes]:
        """Returns how often so many places of training pass over each source whose size is known without reading it."""
        del config, places
        return {}

    @abc.abstractmethod
    def train_batches(
        self, config: ConfigDict, *, tokenizer: Any, seed: int, rows: Sequence[int] | None = None
    ) -> TrainBatches:
        """Returns the batches of training, or the given rows of them."""

    @abc.abstractmethod
    def eval_batches(
        self, config: ConfigDict, *, tokenizer: Any, split: str, context: int, batch_size: int, max_tokens: int | None
    ) -> Iterator[Batch]:
        """Returns one pass over a split in batches of one shape, the last filled up with rows of weight 0."""

    @abc.abstractmethod
    def arrays(self, config: ConfigDict, *, rows: int, context: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Returns (shape, dtype) of every array of a training batch."""

    # The model.

    @abc.abstractmethod
    def build(self, config: ConfigDict, *, data: ConfigDict, tokenizer: Any, target: Any) -> Any:
        """Returns the Flax module with its head, without parameters.

        It has the attributes `config` and those that `gau.models.registry.build` gives a model.

        Args:
          config: the section `model`, resolved.
          data: the section `data`, resolved, for heads whose size it says.
          tokenizer: from `tokenizer`.
          target: what it will run on.
        """

    @abc.abstractmethod
    def init(self, model: Any, key: Any, *, context: int) -> Any:
        """Draws the model's parameters, boxed with their logical axis names."""

    @abc.abstractmethod
    def flops_per_token(self, config: ConfigDict, *, context: int, tokenizer: Any) -> float:
        """Returns the FLOPs of a forward pass for each place of a row; `config` is the section `model`."""

    # Loss and metrics. Traced, on the device.

    @abc.abstractmethod
    def loss(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, dict]:
        """Returns what training differentiates, and what is logged beside it.

        Returns:
          The sum of the batch's losses by their weights, float32; and sums of other metrics by their weights, by name.
          The log has all of them divided by the sum of the weights. Dropout is off without a key.
        """


@functools.cache
def load(name: str) -> Objective:
    """Returns the objective of a name in gau/objectives/, or of `module:Class`.

    Raises:
      UserError: there is none.
    """
    return lookup.find('objective', name, 'objectives')()
