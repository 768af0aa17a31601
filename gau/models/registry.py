"""From a resolved config to a model."""

from ml_collections import ConfigDict, FrozenConfigDict

from gau.models.language_model import LanguageModel


def build(config: ConfigDict, *, vocab_size: int, causal: bool) -> LanguageModel:
    """Returns the model, without parameters: `model.init(key, tokens_BN)['params']` makes them.

    Args:
      config: resolved model config (`gau.models.config.resolve`, with the objective that `causal` says).
      vocab_size: V.
      causal: True for a language model, False for a masked one.
    """
    return LanguageModel(FrozenConfigDict(config), vocab_size, causal)
