"""A language model with a head of classes in the place of its output layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from gau.layers.common import KERNEL_INIT
from gau.models.language_model import LanguageModel
from gau.models.target import Implementation


class Classifier(nn.Module):
    """Which class a sequence belongs to, from one vector of it.

    A causal model is asked at its last token, the only one that has seen the whole sequence; of a bidirectional one
    the mean over the tokens is taken.

    Attributes:
      trunk: the language model.
      num_classes: L.
    """

    trunk: LanguageModel
    num_classes: int

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.trunk.config

    @property
    def implementation(self) -> Implementation:
        """What it is built with."""
        return self.trunk.implementation

    @nn.compact
    def __call__(self, tokens_BN: Array, *, segment_ids_BN: Array | None = None, deterministic: bool = True) -> Array:
        """Returns logits [B, L], float32 (float64 where the model computes in it).

        Args:
          tokens_BN: integer tokens in [0, V).
          segment_ids_BN: 1 at the sequence, 0 at the padding on its right; None: no padding.
          deterministic: False turns dropout on.
        """
        h_BND = self.trunk.hidden(tokens_BN, segment_ids_BN=segment_ids_BN, deterministic=deterministic)
        h_BND = h_BND.astype(jnp.promote_types(h_BND.dtype, jnp.float32))
        real_BN = jnp.ones(tokens_BN.shape, bool) if segment_ids_BN is None else segment_ids_BN > 0
        if self.trunk.causal:
            # By a mask and not by an index: a sequence may lie over several devices.
            last_B1 = jnp.sum(real_BN, axis=1, keepdims=True) - 1
            real_BN &= jnp.arange(real_BN.shape[1]) == last_B1
        count_B1 = jnp.maximum(jnp.sum(real_BN, axis=1, keepdims=True), 1)
        pooled_BD = jnp.sum(jnp.where(real_BN[..., None], h_BND, 0), axis=1) / count_B1
        pooled_BD = nn.Dropout(self.config.dropout_rate)(pooled_BD, deterministic=deterministic)
        return nn.Dense(
            self.num_classes,
            dtype=h_BND.dtype,
            param_dtype=h_BND.dtype,
            kernel_init=nn.with_logical_partitioning(KERNEL_INIT, ('embed', None)),
            name='head',
        )(pooled_BD)
