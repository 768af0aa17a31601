"""What all layers share: the dense layer, what a layer is told about its tokens, and the loop over heads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback
from jax import Array

from gau.ops.decoding import DecodePosition

KERNEL_INIT = nn.initializers.normal(0.02)


class Source(NamedTuple):
    """A second sequence, for layers that read one (`gau.layers.cross_attention`).

    Attributes:
      h_BMD: what an encoder made of it.
      segment_ids_BM: 0 at its padding, or None.
    """

    h_BMD: Array
    segment_ids_BM: Array | None


class TokenInfo(NamedTuple):
    """What the layers of one call share.

    Attributes:
      segment_ids_BN: documents and padding (see gau.ops), or None.
      positions_BN: position of each token in its document, [B, N] or [1, N].
      rope: for every width in use, the cosines and sines of `gau.ops.positions.rope_table`.
      decode: where a block of tokens stands in sequences that are decoded; the layers then have their state in the
        collection 'cache' (`gau.layers.state`). None where whole sequences are computed at once.
      source: what cross-attention reads, or None.
    """

    segment_ids_BN: Array | None
    positions_BN: Array
    rope: dict[int, tuple[Array, Array]]
    decode: DecodePosition | None = None
    source: Source | None = None

    @property
    def whole(self) -> bool:
        """Whether training's implementation computes the layers: of whole sequences, or of blocks that it can read."""
        return self.decode is None or self.decode.whole


def param_dtype(dtype) -> jnp.dtype:
    """Returns the type of parameters: float32, or float64 where the computation is in float64."""
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
    def __call__(self, x: Array) -> Array:
        """Maps [..., D...] to [..., F...]."""
        kernel, bias = self._parameters(x)
        return jnp.tensordot(x.astype(self.dtype), kernel, axes=len(self.in_axes)) + bias.astype(self.dtype)

    def _parameters(self, x: Array) -> tuple[Array, Array]:
        inputs = x.shape[x.ndim - len(self.in_axes) :]
        init = nn.with_logical_partitioning(KERNEL_INIT, self.in_axes + self.out_axes)
        kernel = self.param('kernel', init, inputs + self.features, param_dtype(self.dtype))
        init = nn.with_logical_partitioning(nn.initializers.zeros, self.out_axes)
        bias = self.param('bias', init, self.features, param_dtype(self.dtype))
        return kernel.astype(self.dtype), bias


class Weights(Linear):
    """The parameters of a `Linear` without its matmul, for an op that has a matmul or adds the bias itself."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Returns the kernel [D..., F...] in the compute type, and the bias [F...], for inputs x [..., D...]."""
        return self._parameters(x)


class Temperature(nn.Module):
    """Multiplies queries, and with them q.k, by one learned scalar that starts at 1."""

    @nn.compact
    def __call__(self, q: Array) -> Array:
        """Returns q, scaled."""
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
