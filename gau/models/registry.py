"""From a resolved config to a model."""

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from gau.models.implementations import settle
from gau.models.language_model import LanguageModel
from gau.models.target import Target


def build(config: ConfigDict, *, vocab_size: int, causal: bool, target: Target | None = None) -> LanguageModel:
    """Returns the model, without parameters: `model.init(key, tokens_BN)['params']` makes them.

    Args:
      config: resolved model config (`gau.models.config.resolve`, with the same `causal`).
      vocab_size: V.
      causal: True for a language model, False for a masked one.
      target: what it will run on; None means the device that JAX computes on by default. The model's `implementation`
        is what works there (`gau.models.implementations`).

    Raises:
      UserError: the config asks for an implementation that does not work on the target.
    """
    target = Target.of_device(jax.devices()[0]) if target is None else target
    return LanguageModel(FrozenConfigDict(config), vocab_size, causal, settle(config, target=target))
