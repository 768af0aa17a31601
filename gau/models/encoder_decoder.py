"""The encoder-decoder: a bidirectional stack that reads a source, and a causal one that predicts the target from it.

A row is both: the source in its first N / 2 places, the target in the others, each padded on its right. So a batch has
the arrays of a language model's, and whatever lays, cuts and counts those does so here.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from ml_collections import FrozenConfigDict

from gau.layers.common import Source
from gau.models.implementations import settle
from gau.models.language_model import Embedding, LanguageModel
from gau.models.target import Implementation, Target


class Stack(LanguageModel):
    """One of the two stacks. It may begin with its embeddings scaled; those of the output layer never are."""

    def embedded(self, tokens_BN: Array) -> Array:
        """See the base class; times sqrt(D) where the config says so."""
        x_BND = super().embedded(tokens_BN)
        return x_BND * self.config.model_dim**0.5 if self.config.embedding_scale == 'width' else x_BND


class Encoder(Stack):
    """The bidirectional one, with the embedding of the decoder.

    Attributes:
      shared: the embedding.
    """

    shared: Embedding | None = None

    def setup(self):
        """Makes what a language model has, but for the embedding."""
        super().setup()
        self.embedding = self.shared


class EncoderDecoder(nn.Module):
    """Predicts each row's target, token by token, from its source; the methods are those of `LanguageModel`.

    They take:
      tokens_BN: sources and targets, N even.
      segment_ids_BN: integers; 0 is padding. None: there is none.
      positions_BN: position of each token in its source or target; None: 0, 1, ... N / 2 - 1 in both.
      deterministic: False turns dropout on.

    Attributes:
      config: resolved model config of a family with `gau.models.families.cross.ReadsSource`, frozen.
      vocab_size: V.
      implementation: what both stacks are built with.
    """

    config: Any
    vocab_size: int
    implementation: Implementation

    def setup(self):
        """Makes `decoder`, which has the embedding, and `encoder`."""
        fields = self.config, self.vocab_size
        self.decoder = Stack(*fields, causal=True, implementation=self.implementation)
        self.encoder = Encoder(*fields, causal=False, implementation=self.implementation, shared=self.decoder.embedding)

    def __call__(self, tokens_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True) -> Array:
        """Returns the logits of the targets, [B, N / 2, V], float32 (float64)."""
        h_BTD = self.hidden(
            tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN, deterministic=deterministic
        )
        return self.decoder.logits(h_BTD)

    def token_losses(
        self, tokens_BN, targets_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True
    ) -> Array:
        """Returns -log p(target) in nats, [B, N], float32 (float64); 0 at the places of the source."""
        h_BTD = self.hidden(
            tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN, deterministic=deterministic
        )
        nll_BT = self.decoder.losses(h_BTD, _halves(targets_BN)[1])
        return jnp.concatenate([jnp.zeros_like(nll_BT), nll_BT], axis=1)

    def weighted_loss(
        self, tokens_BN, targets_BN, weights_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True
    ) -> Array:
        """Returns the sum of weights times `token_losses`, float32 (float64); see `LanguageModel.weighted_loss`."""
        h_BTD = self.hidden(
            tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN, deterministic=deterministic
        )
        return self.decoder.weighted_losses(h_BTD, _halves(targets_BN)[1], _halves(weights_BN)[1])

    def hidden(self, tokens_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True) -> Array:
        """Returns what the output layer reads of the targets, [B, N / 2, D] in the compute type; finite at padding."""
        source_BT, target_BT = _halves(tokens_BN)
        (source_ids_BT, target_ids_BT), (source_positions_BT, target_positions_BT) = (
            (None, None) if x is None else _halves(x) for x in (segment_ids_BN, positions_BN)
        )
        h_BTD = self.encoder.hidden(
            source_BT,
            segment_ids_BN=source_ids_BT,
            positions_BN=source_positions_BT,
            deterministic=deterministic,
        )
        return self.decoder.hidden(
            target_BT,
            segment_ids_BN=target_ids_BT,
            positions_BN=target_positions_BT,
            deterministic=deterministic,
            source=Source(h_BTD, source_ids_BT),
        )


def build(config: Any, *, vocab_size: int, target: Target) -> EncoderDecoder:
    """Returns the model of a resolved config, without parameters.

    Args:
      config: resolved model config of a model that reads a source.
      vocab_size: V.
      target: what it will run on.

    Raises:
      UserError: the config asks for an implementation that does not work on the target.
    """
    return EncoderDecoder(FrozenConfigDict(config), vocab_size, settle(config, target=target))


def _halves(x_BN: Array) -> tuple[Array, Array]:
    half = x_BN.shape[1] // 2
    return x_BN[:, :half], x_BN[:, half:]
