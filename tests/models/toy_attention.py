"""An attention that the library does not have, in one file: what somebody writes who adds one. See test_new_attention.

    A = sigmoid(sharpness q.k + b) / (keys that the query sees)

with one learned b. Registered as `toy` (a gated unit) and `toy_transformer`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gau.layers.common import over_heads, param_dtype
from gau.layers.core import AttentionCore
from gau.models.architectures import ARCHITECTURES, Architecture
from gau.models.attentions.record import ANYWHERE, Attention
from gau.models.costs import Count, saved
from gau.models.families.gated_unit import GatedUnit
from gau.models.families.transformer import Transformer
from gau.models.fields import number, table
from gau.ops.masks import clear_padding, visibility_mask


def sigmoid_attention(q_BNS, k_BNS, v_BNE, b, *, sharpness, causal, segment_ids_BN):
    """A V of the formula above, one head."""
    n = q_BNS.shape[1]
    mask_BNN = visibility_mask(segment_ids_BN, segment_ids_BN, n=n, m=n, causal=causal)
    mask_BNN = jnp.ones((1, n, n), bool) if mask_BNN is None else mask_BNN
    a_BNN = jax.nn.sigmoid(sharpness * jnp.einsum('BNS,BMS->BNM', q_BNS, k_BNS) + b)
    a_BNN = jnp.where(mask_BNN, a_BNN, 0) / jnp.maximum(mask_BNN.sum(-1, keepdims=True), 1)
    return clear_padding(a_BNN.astype(v_BNE.dtype) @ v_BNE, segment_ids_BN)


class ToyCore(AttentionCore):
    """The formula above."""

    sharpness: float = 1.0

    def setup(self):
        self.offset = self.param('offset', nn.initializers.zeros, (), param_dtype(self.dtype))

    def __call__(self, queries_keys, v_BHNE, tokens):
        def attend(q_BNS, k_BNS, v_BNE, _):
            fields = {'sharpness': self.sharpness, 'causal': self.causal, 'segment_ids_BN': tokens.segment_ids_BN}
            return sigmoid_attention(q_BNS, k_BNS, v_BNE, self.offset, **fields)

        return over_heads(attend, *queries_keys, v_BHNE, bias=None)


class Toy(Attention):
    """The record."""

    fields = table(sharpness=number('Factor on q.k.', default=1.0, wrong=lambda value: not value > 0, right='positive'))
    implementations = table(reference=ANYWHERE)

    def core(self, config, *, heads, width, causal, impl):
        return ToyCore(causal=causal, impl=impl, dtype=config.dtype, sharpness=config.sharpness, parent=None)

    def count(self, config, shape, *, causal):
        seen = shape.context / 2 if causal else shape.context
        flops = 2 * shape.heads * seen * (shape.width + shape.value_width)
        return Count(1, flops) + saved(config, 0, matrix=shape.heads * shape.context)

    def shard_multiple(self, config):
        return 4


def register():
    """Adds the two models."""
    ARCHITECTURES['toy'] = Architecture(GatedUnit(), Toy())
    ARCHITECTURES['toy_transformer'] = Architecture(Transformer(), Toy())
