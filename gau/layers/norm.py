"""The residual stream as blocks hand it on, and norms with their parameters."""

from typing import NamedTuple

import flax.linen as nn
from jax import Array

from gau.layers.common import TokenInfo, param_dtype
from gau.layers.sharding import over_mesh
from gau.ops.kernels.norm import scale_norm_of_stream
from gau.ops.norms import layer_norm, scale_norm


class Stream(NamedTuple):
    """The residual stream x + bias.

    Attributes:
      x_BND: the stream; or, with a `bias_D`, without the biases that blocks added to it.
      bias_D: the sum of these, float32. A kernel that normalises the stream adds it, and has the gradient for it in the
        pass over the tokens that it makes anyway.
    """

    x_BND: Array
    bias_D: Array | None = None

    def plus(self, y_BND: Array, bias_D: Array | None) -> 'Stream':
        """Returns the stream after a layer that adds y + bias, which may be None."""
        x_BND, y_BND = self.x_BND, y_BND.astype(self.x_BND.dtype)
        if self.bias_D is None:
            return Stream(x_BND + (y_BND if bias_D is None else y_BND + bias_D.astype(y_BND.dtype)))
        # The library's product that makes y adds x to it, as rows. The kernels of norms take x as rows too, so that it
        # has several readers: a view for the product alone XLA would overwrite, and for that copy x first.
        rows = (-1, x_BND.shape[-1])
        x_BND = (x_BND.reshape(rows) + y_BND.reshape(rows)).reshape(x_BND.shape)
        return Stream(x_BND, self.bias_D if bias_D is None else self.bias_D + bias_D)


class Norm(nn.Module):
    """ScaleNorm (one scalar, docs/paper.md section 2), LayerNorm or RMSNorm over the last axis, in float32.

    Attributes:
      kind: 'scale_norm' x / rms(x) * g with one g; 'rms_norm' with one g a feature; 'layer_norm' (x - mean) / std * g
        + b.
      dtype: type of the result.
      impl: 'triton' has kernels for ScaleNorm; all others leave it to the compiler.
    """

    kind: str
    dtype: str
    impl: str = 'xla'

    @nn.compact
    def __call__(self, stream: Stream, tokens: TokenInfo) -> tuple[Stream, Array]:
        """Returns the same stream, for a later `plus`, and the stream normalised, [B, N, D]."""
        dtype, width = param_dtype(self.dtype), stream.x_BND.shape[-1]
        shape, axes = ((), ()) if self.kind == 'scale_norm' else ((width,), ('norm',))
        scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, axes), shape, dtype)
        if self.kind == 'scale_norm' and self.impl == 'triton' and tokens.at is None:
            x_BND, h_BND = over_mesh(
                lambda x, bias, g, sequence_axis: scale_norm_of_stream(x, bias, g, self.dtype),
                *stream,
                scale,
                axes=[('batch', 'length', 'act_embed'), (None,), ()],
                result_like=0,
                token_multiple=1,
            )
            return stream._replace(x_BND=x_BND), h_BND
        x_BND = stream.x_BND if stream.bias_D is None else stream.x_BND + stream.bias_D
        if self.kind == 'layer_norm':
            bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, dtype)
            return stream, layer_norm(x_BND, scale, bias, dtype=self.dtype)
        return stream, scale_norm(x_BND, scale, dtype=self.dtype)
