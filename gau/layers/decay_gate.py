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

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        """Returns the logits [B, N, L], L = 1 or S, float32 or better, of normalised inputs."""
        dtype, scalar = param_dtype(self.dtype), self.kind == 'scalar'
        rank, columns = (1, 1) if scalar else (RANK, self.width)
        inputs = nn.with_logical_partitioning(KERNEL_INIT, ('embed', None))
        down_DR = self.param('down', inputs, (x_BND.shape[-1], rank), dtype).astype(x_BND.dtype)
        logits = jnp.einsum('BND,DR->BNR', x_BND, down_DR, preferred_element_type=dtype)
        if not scalar:
            outputs = nn.with_logical_partitioning(KERNEL_INIT, (None, 'query_key'))
            logits = logits @ self.param('up', outputs, (rank, columns), dtype)
        start = nn.with_logical_partitioning(_start, (None if scalar else 'query_key',))
        return logits + self.param('bias', start, (columns,), dtype)


def _start(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    del key
    (columns,) = shape
    kept = jnp.asarray([KEPT] if columns == 1 else KEPT_BY_GROUP, dtype)
    return jax.scipy.special.logit(kept[jnp.arange(columns) * len(kept) // columns])
