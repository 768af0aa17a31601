"""The residual stream and its ScaleNorm for the kernels of a GPU: biases are kept apart from the stream.

A kernel that normalises the stream reads all of it anyway. So it adds the biases of the layers before it, forwards, and
has their gradient, a sum over all tokens, from the same pass backwards. The same with a gate of one number that reads
what is normalised: its product, and its gradients, would be three more passes.
"""

from typing import NamedTuple

from jax import Array

from gau.layers.norm import Norm
from gau.layers.sharding import over_mesh
from gau.ops.kernels.norm import scale_norm_of_residual


class Residual(NamedTuple):
    """The residual stream x + bias.

    Attributes:
      x_BND: the stream without the biases that layers added to it.
      bias_D: the sum of these, float32.
    """

    x_BND: Array
    bias_D: Array

    def plus(self, y_BND: Array, bias_D: Array | None) -> 'Residual':
        """Returns the stream after a layer that adds y + bias; a bias of None is 0."""
        x_BND, y_BND = self.x_BND, y_BND.astype(self.x_BND.dtype)
        # The library's matmul that makes y adds x to it, as rows. The kernels of norms take x as rows too, so that it
        # has several readers: a view for the matmul alone XLA would overwrite, and for that copy x first.
        rows = (-1, x_BND.shape[-1])
        x_BND = (x_BND.reshape(rows) + y_BND.reshape(rows)).reshape(x_BND.shape)
        return Residual(x_BND, self.bias_D if bias_D is None else self.bias_D + bias_D)


class FusedScaleNorm(Norm):
    """A `Norm` of kind 'scale_norm' with a kernel for the residual stream and its biases."""

    def of_residual(self, residual: Residual, gate_D: Array | None = None) -> tuple[Residual, Array, Array | None]:
        """Returns the stream, for a later `plus`; h, x + bias normalised, [B, N, D]; and h.gate, float32 [B, N, 1]."""
        x_BND, h_BND, logit_BN1 = over_mesh(
            lambda x, bias, g, gate, sequence_axis: scale_norm_of_residual(x, bias, g, gate, self.dtype),
            *(*residual, self.scale, gate_D),
            axes=[('batch', 'length', 'act_embed'), (None,), (), (None,)],
            result_like=0,
            token_multiple=1,
        )
        return residual._replace(x_BND=x_BND), h_BND, logit_BN1
