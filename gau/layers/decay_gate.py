"""The gate that decides how much of its state a mixed chunk attention keeps over a chunk (`gau.ops.gated_states`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.layers.common import KERNEL_INIT, param_dtype

# What the state keeps over a chunk at the start.
KEPT = 0.97


class DecayGate(nn.Module):
    """The logits of the gate for every token, x w + b.

    Attributes:
      dtype: compute type.
    """

    dtype: str

    def __call__(self, x_BND: Array) -> Array:
        """Returns the logits [B, N, 1], float32 or better, of normalised inputs."""
        w_D1, bias_1 = self.parameters(x_BND.shape[-1])
        w_D1 = w_D1.astype(x_BND.dtype)
        return jnp.einsum('BND,DR->BNR', x_BND, w_D1, preferred_element_type=param_dtype(self.dtype)) + bias_1

    @nn.compact
    def parameters(self, inputs: int) -> tuple[Array, Array]:
        """Returns w, [D, 1], and b, [1]."""
        dtype = param_dtype(self.dtype)
        init = nn.with_logical_partitioning(KERNEL_INIT, ('embed', None))
        w_D1 = self.param('down', init, (inputs, 1), dtype)
        return w_D1, self.param('bias', nn.with_logical_partitioning(_start, (None,)), (1,), dtype)


def _start(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    del key
    return jax.scipy.special.logit(jnp.full(shape, KEPT, dtype))
