"""What a point costs before it runs: parameters, tokens, FLOPs, and hours on a chip, in closed form (no JAX)."""

from types import SimpleNamespace
from typing import NamedTuple

from ml_collections import ConfigDict

from gau.data.passes import Passes
from gau.models import counts
from gau.objectives import objective as objectives


class Cost(NamedTuple):
    """What one run costs.

    Attributes:
      parameters: trained numbers.
      steps, tokens: of the whole run; None where it is given in epochs, which only the data know.
      flops_per_token: of one training step: three times the forward pass.
      passes: over the source that is passed over most often; None where no manifest says how large one is.
    """

    parameters: int
    steps: int | None
    tokens: int | None
    flops_per_token: float
    passes: Passes | None = None

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole run; None where the tokens are not known."""
        return None if self.tokens is None else self.flops_per_token * self.tokens

    def hours(self, peak_flops: float, utilisation: float) -> float | None:
        """Returns the hours on one chip that reaches such a share of its peak in FLOP/s."""
        return None if self.flops is None else self.flops / (peak_flops * utilisation) / 3600


def cost(config: ConfigDict, *, vocab_size: int | None = None) -> Cost:
    """Returns the cost of the run of a resolved config, by default with its tokenizer's vocabulary.

    Raises:
      UserError: its tokenizer cannot be read.
    """
    # Imported late: a tokenizer brings NumPy.
    from gau.data import tokenizers

    vocab_size = vocab_size or tokenizers.load(config.data.tokenizer).vocab_size
    # Of a tokenizer an objective asks nothing else here.
    vocabulary = SimpleNamespace(vocab_size=vocab_size)
    objective, context = objectives.load(config.objective), config.data.context
    forward = objective.flops_per_token(config.model, context=context, tokenizer=vocabulary)
    steps = total_steps(config)
    tokens = None if steps is None else steps * tokens_per_step(config)
    passes = {} if tokens is None else objective.passes(config.data, tokens)
    most = max(passes.values(), key=lambda each: each.times, default=None)
    return Cost(counts.parameters(config.model, vocab_size=vocab_size), steps, tokens, 3 * forward, most)


def tokens_per_step(config: ConfigDict) -> int:
    """Returns the tokens in one global batch."""
    return config.data.batch_size * config.data.context


def total_steps(config: ConfigDict) -> int | None:
    """Returns the steps of the run; None where it is given in epochs."""
    if config.tokens is not None:
        return -(-config.tokens // tokens_per_step(config))
    return config.steps
