"""The residual stream as blocks hand it on, and norms with their parameters."""

from typing import NamedTuple

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo, param_dtype
from gau.layers.sharding import over_mesh
from gau.ops.kernels.norm import add_and_scale_norm
from gau.ops.norms import layer_norm, residual_sum, scale_norm


class Stream(NamedTuple):
    """The residual stream x + y + bias, which whoever normalises it adds up in the same pass.

    Attributes:
      x_BND: the stream.
      y_BND: what is still to be added to it: the last layer's output without its bias; or None.
      bias_D: that bias, or None where y has it; None where y is.
    """

    x_BND: Array
    y_BND: Array | None = None
    bias_D: Array | None = None


class Norm(nn.Module):
    """ScaleNorm (one scalar, docs/paper.md section 2), LayerNorm or RMSNorm over the last axis, in float32.

    Attributes:
      kind: 'scale_norm' x / rms(x) * g with one g; 'rms_norm' with one g a feature; 'layer_norm' (x - mean) / std * g
        + b.
      dtype: type of the result.
      impl: 'triton' has kernels for ScaleNorm with the sum before it; all others leave it to the compiler.
    """

    kind: str
    dtype: str
    impl: str = 'xla'

    @nn.compact
    def __call__(self, stream: Stream, tokens: TokenInfo) -> tuple[Array, Array]:
        """Returns the stream added up, [B, N, D], to go on with, and the same normalised."""
        dtype, width = param_dtype(self.dtype), stream.x_BND.shape[-1]
        shape, axes = ((), ()) if self.kind == 'scale_norm' else ((width,), ('norm',))
        scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, axes), shape, dtype)
        if self.kind == 'scale_norm' and self.impl == 'triton' and tokens.at is None:
            return over_mesh(
                lambda x, y, bias, g, sequence_axis: add_and_scale_norm(x, y, bias, g, self.dtype),
                *stream,
                scale,
                axes=[('batch', 'length', 'act_embed')] * 2 + [(None,), ()],
                result_like=0,
                token_multiple=1,
            )
        x_BND = residual_sum(*stream)
        if self.kind == 'layer_norm':
            bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, dtype)
            return x_BND, layer_norm(x_BND, scale, bias, dtype=self.dtype)
        return x_BND, scale_norm(x_BND, scale, dtype=self.dtype)
