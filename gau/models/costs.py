"""What parts of a model cost, for records to add up (no JAX); `gau.models.counts` says what is counted."""

from typing import NamedTuple

from ml_collections import ConfigDict

BYTES = {'bfloat16': 2, 'float32': 4, 'float64': 8}


class Count(NamedTuple):
    """What one part of a model costs.

    Attributes:
      parameters: number of trained numbers.
      flops: forward FLOPs per token.
      activation_bytes: bytes per token saved for the backward pass without remat.
    """

    parameters: int = 0
    flops: float = 0
    activation_bytes: float = 0

    def __add__(self, other: 'Count') -> 'Count':
        return Count(*(x + y for x, y in zip(self, other, strict=True)))


class Shape(NamedTuple):
    """The arrays that an attention has between the projections of a layer.

    Attributes:
      heads: H.
      width: S (K), of queries and keys.
      value_width: E / H (K), of values.
      context: N.
    """

    heads: int
    width: int
    value_width: float
    context: int


def norm(config: ConfigDict) -> Count:
    """One norm over the model's width."""
    d = config.model_dim
    numbers = {'scale_norm': 1, 'rms_norm': d, 'layer_norm': 2 * d}[config.norm]
    return Count(numbers, 0, 2 * d * BYTES[config.dtype])


def layer_inputs(config: ConfigDict) -> Count:
    """The norms of one layer in its residual connection, and its short convolution."""
    one, width = norm(config), config.short_convolution or 0
    total = one + one if config.norm_placement == 'sandwich' else one
    return total + Count(width * config.model_dim) + saved(config, config.model_dim) if width else total


def input_state(config: ConfigDict) -> int:
    """Bytes of what the short convolution of one layer remembers while a sequence is decoded."""
    return (config.short_convolution or 0) * config.model_dim * BYTES[config.dtype]


def linear(inputs: int, outputs: int) -> Count:
    """A dense layer with bias, without its activations: whoever uses them counts them."""
    return Count(inputs * outputs + outputs, 2 * inputs * outputs, 0)


def saved(config: ConfigDict, numbers: float, *, matrix: float = 0) -> Count:
    """`numbers` per token in the compute type, `matrix` attention weights (scores float32, weights compute type)."""
    size = BYTES[config.dtype]
    return Count(0, 0, numbers * size + matrix * (max(4, size) + size))
