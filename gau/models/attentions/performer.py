"""Performer."""

from ml_collections import ConfigDict

from gau.models.attentions.record import Attention
from gau.models.costs import BYTES, Count, Shape, saved
from gau.models.fields import choice, count, table

# Tokens in a chunk of the causal form (`gau.ops.linear_attention.CHUNK`).
CHUNK = 128


class Performer(Attention):
    """Linear attention through a feature map."""

    fields = table(
        feature_map=choice('relu(x), or positive orthogonal random features.', 'relu', 'favor', default='relu'),
        num_features=count('Random features of feature_map=favor.', default=256),
    )

    def core(self, config, *, heads, width, causal, impl):
        """See the base class."""
        from gau.layers.performer import PerformerCore

        fields = {'feature_map': config.feature_map, 'num_features': config.num_features}
        return PerformerCore(causal=causal, impl=impl, dtype=config.dtype, **fields, parent=None)

    def idle_fields(self, config: ConfigDict) -> dict[str, str]:
        """See the base class."""
        if config.feature_map == 'favor':
            return {}
        return {'num_features': 'it is the number of random features of feature_map=favor'}

    def count(self, config: ConfigDict, shape: Shape, *, causal: bool) -> Count:
        """See the base class."""
        favor = config.feature_map == 'favor'
        h, k, features = shape.heads, shape.width, config.num_features if favor else shape.width
        # The features, then k v^T and q times it, with the denominator's column beside the values.
        flops, matrix = 4 * h * k * features * favor + 4 * h * features * (k + 1), 0
        if causal:
            c = min(CHUNK, shape.context)
            flops += 2 * h * (c / 2) * (features + k + 1)
            matrix = h * c
        return Count(0, flops, 0) + saved(config, 2 * h * features, matrix=matrix)

    def state_bytes(self, config: ConfigDict, shape: Shape) -> float:
        """See the base class."""
        favor = config.feature_map == 'favor'
        features = config.num_features if favor else shape.width
        return shape.heads * (features * (shape.value_width + 1) + favor) * max(4, BYTES[config.dtype])

    def refuses_decoding(self, config: ConfigDict) -> None:
        """See the base class."""
