"""Norms with their parameters."""

import flax.linen as nn
from jax import Array

from gau.layers.common import param_dtype
from gau.ops.norms import layer_norm, scale_norm


class Norm(nn.Module):
    """ScaleNorm (one scalar, docs/paper.md section 2), LayerNorm or RMSNorm over the last axis, in float32.

    Attributes:
      kind: 'scale_norm' x / rms(x) * g with one g; 'rms_norm' with one g a feature; 'layer_norm' (x - mean) / std * g
        + b.
      width: D.
      dtype: type of the result.
    """

    kind: str
    width: int
    dtype: str

    def setup(self):
        """Makes `scale` and, for LayerNorm, `bias`."""
        dtype = param_dtype(self.dtype)
        shape, axes = ((), ()) if self.kind == 'scale_norm' else ((self.width,), ('norm',))
        self.scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, axes), shape, dtype)
        if self.kind == 'layer_norm':
            self.bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, axes), shape, dtype)

    def __call__(self, x_BND: Array) -> Array:
        """Returns x normalised, [B, N, D]."""
        if self.kind == 'layer_norm':
            return layer_norm(x_BND, self.scale, self.bias, dtype=self.dtype)
        return scale_norm(x_BND, self.scale, dtype=self.dtype)
