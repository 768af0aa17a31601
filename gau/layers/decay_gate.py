"""The gate that decides how much of its state a mixed chunk attention keeps over a chunk (`gau.ops.gated_states`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.layers.common import KERNEL_INIT, param_dtype

# What the state keeps over a chunk at the start: all of it alike; or groups of columns, some longer than others.
KEPT = 0.97
KEPT_BY_GROUP = (0.995, 0.97, 0.9, 0.8, 0.6, 0.3)
RANK = 16


class DecayGate(nn.Module):
    """The logits of the gate for every token: x w + b, or (x W1) W2 + b with W1 of `RANK` columns.

    Attributes:
      kind: 'scalar': one logit; 'keys': one for each column of the keys.
      width: S.
      dtype: compute type.
    """

    kind: str
    width: int
    dtype: str

    def __call__(self, x_BND: Array) -> Array:
        """Returns the logits [B, N, L], L = 1 or S, float32 or better, of normalised inputs."""
        down_DR, *up_RL, bias_L = self.parameters(x_BND.shape[-1])
        down_DR = down_DR.astype(x_BND.dtype)
        logits = jnp.einsum('BND,DR->BNR', x_BND, down_DR, preferred_element_type=param_dtype(self.dtype))
        return (logits @ up_RL[0] if up_RL else logits) + bias_L

    @nn.compact
    def parameters(self, inputs: int) -> list[Array]:
        """Returns w, [D, 1], and b, [1]; or W1, W2 and b."""
        dtype, scalar = param_dtype(self.dtype), self.kind == 'scalar'
        rank, columns = (1, 1) if scalar else (RANK, self.width)
        init = nn.with_logical_partitioning(KERNEL_INIT, ('embed', None))
        parameters = [self.param('down', init, (inputs, rank), dtype)]
        if not scalar:
            init = nn.with_logical_partitioning(KERNEL_INIT, (None, 'query_key'))
            parameters.append(self.param('up', init, (rank, columns), dtype))
        init = nn.with_logical_partitioning(_start, (None if scalar else 'query_key',))
        return [*parameters, self.param('bias', init, (columns,), dtype)]


def _start(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    del key
    (columns,) = shape
    kept = jnp.asarray([KEPT] if columns == 1 else KEPT_BY_GROUP, dtype)
    return jax.scipy.special.logit(kept[jnp.arange(columns) * len(kept) // columns])
