"""Norms with their parameters."""

import flax.linen as nn
from jax import Array

from gau.layers.common import param_dtype
from gau.layers.sharding import over_mesh
from gau.ops.kernels.norm import stream_and_scale_norm
from gau.ops.norms import layer_norm, scale_norm


class Norm(nn.Module):
    """ScaleNorm (one scalar, docs/paper.md section 2), LayerNorm or RMSNorm over the last axis, in float32.

    Attributes:
      kind: 'scale_norm' x / rms(x) * g with one g; 'rms_norm' with one g a feature; 'layer_norm' (x - mean) / std * g
        + b.
      dtype: type of the result.
      impl: 'triton' has a kernel for the gradient of ScaleNorm; all others leave it to the compiler.
    """

    kind: str
    dtype: str
    impl: str = 'xla'

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        """Returns the stream x [..., D] to go on with, and x normalised, twice: for two that read it.

        Who takes each from here gets their gradients summed up in one pass.
        """
        dtype = param_dtype(self.dtype)
        shape, axes = ((), ()) if self.kind == 'scale_norm' else ((x.shape[-1],), ('norm',))
        scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, axes), shape, dtype)
        if self.kind == 'layer_norm':
            bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, dtype)
            y = layer_norm(x, scale, bias, dtype=self.dtype)
            return x, y, y
        if self.kind == 'scale_norm' and self.impl == 'triton':
            stream = ('batch', 'length', 'act_embed')
            return over_mesh(
                lambda x, g, sequence_axis: stream_and_scale_norm(x, g, self.dtype),
                x,
                scale,
                axes=[stream, ()],
                result_like=0,
                token_multiple=1,
            )
        y = scale_norm(x, scale, dtype=self.dtype)
        return x, y, y
