"""What all layers share: the dense layer, what a layer is told about its tokens, and the loop over heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback
from jax import Array

from gau.ops.decoding import Continuation

KERNEL_INIT = nn.initializers.normal(0.02)


class TokenInfo(NamedTuple):
    """What the layers of one call share.

    Attributes:
      segment_ids_BN: documents and padding (see gau.ops), or None.
      positions_BN: position of each token in its document, [B, N] or [1, N].
      rope: for every width in use, the cosines and sines of `gau.ops.positions.rope_table`.
      at: where a block of tokens stands in texts that are read bit by bit; the layers then keep their state in the
        collection 'cache' (`gau.layers.state`). None where whole texts are read at once.
    """

    segment_ids_BN: Array | None
    positions_BN: Array
    rope: dict[int, tuple[Array, Array]]
    at: Continuation | None = None


def param_dtype(dtype) -> jnp.dtype:
    """Returns the type parameters are kept in: float32, or float64 where the computation is in float64."""
    return jnp.promote_types(dtype, jnp.float32)


def constrain(x: Array, *names: str | None) -> Array:
    """Names the axes of an activation for sharding; does nothing outside a mesh, fails on a name without a rule."""
    return nn.with_logical_constraint(x, names, fallback=RulesFallback.RAISE_ERROR)


class Linear(nn.Module):
    """x W + b with kernel [D..., F...] ~ N(0, 0.02) and a bias of zeros.

    Attributes:
      features: output axes, one or more.
      in_axes: logical names of the input axes, the last axes of x.
      out_axes: logical names of the output axes.
      dtype: compute type.
    """

    features: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, add_bias: bool = True) -> Array | tuple[Array, Array]:
        """Maps [..., D...] to [..., F...]; without `add_bias` returns x W and b, for an op that adds b itself."""
        kernel, bias = self._parameters(x)
        y = jnp.tensordot(x.astype(self.dtype), kernel, axes=len(self.in_axes))
        return y + bias.astype(self.dtype) if add_bias else (y, bias)

    def _parameters(self, x: Array) -> tuple[Array, Array]:
        inputs = x.shape[x.ndim - len(self.in_axes) :]
        init = nn.with_logical_partitioning(KERNEL_INIT, self.in_axes + self.out_axes)
        kernel = self.param('kernel', init, inputs + self.features, param_dtype(self.dtype))
        init = nn.with_logical_partitioning(nn.initializers.zeros, self.out_axes)
        bias = self.param('bias', init, self.features, param_dtype(self.dtype))
        return kernel.astype(self.dtype), bias


class Weights(Linear):
    """The parameters of a `Linear` without its product, for one product with the weights of several."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Returns the kernel [D..., F...] in the compute type, and the bias [F...], for inputs x [..., D...]."""
        return self._parameters(x)


class Temperature(nn.Module):
    """Multiplies queries, and with them q.k, by one learned scalar that starts at 1 ('learned'), or not ('none')."""

    kind: str

    @nn.compact
    def __call__(self, q: Array) -> Array:
        """Returns q, heated."""
        if self.kind == 'none':
            return q
        init = nn.with_logical_partitioning(nn.initializers.ones, ())
        return q * self.param('scale', init, (), param_dtype(q.dtype)).astype(q.dtype)


def over_heads(op: Callable[..., Any], *x_BHNK: Any, bias: Array | None) -> Any:
    """Applies a single-head op(x_BNK..., bias) to every head: arrays [B, H, N, K], result [B, H, N, K'].

    Arguments and result may be trees of such arrays.
    """
    if jax.tree.leaves(x_BHNK)[0].shape[1] == 1:
        first = jax.tree.map(lambda x: x[:, 0], x_BHNK)
        result = op(*first, None if bias is None else bias[0])
        return jax.tree.map(lambda x: x[:, None], result)
    in_axes = (1,) * len(x_BHNK) + (None if bias is None else 0,)
    return jax.vmap(op, in_axes=in_axes, out_axes=1)(*x_BHNK, bias)
