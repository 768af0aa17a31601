"""Layers that read a second sequence, the source: a gated attention unit, and the Transformer's multi-head attention.

With X the normalised input, Y what the encoder made of the source, per head:

    U = silu(X Wu)   Z = silu(X Wz)   V = silu(Y Wv)   Z' = silu(Y Wz')
    Q = Z * gamma_q + beta_q          K = Z' * gamma_k + beta_k
    O = (U * (A V)) Wo                A = f(Q K^T / n + b)

Neither rotates queries and keys: a place in the source is no place in the target. b is one learned number a head, for
relu^2 alone. It starts at 2, so that a weight starts as 4 / keys, as with the start of the relative bias that is best
for attention within a sequence (docs/results/relu2.md); without it q.k is so small at first that nothing is read.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.errors import UserError
from gau.layers.common import Linear, Source, TokenInfo, constrain, param_dtype
from gau.layers.gated_attention_unit import ScaleOffset, merge_heads, split_heads
from gau.layers.sharding import attention_over_mesh
from gau.ops.cross_attention import cross_attention
from gau.ops.scores import SOFTMAXES, Scoring

BIAS_START = 2.0


class CrossGatedAttentionUnit(nn.Module):
    """Cross-GAU(x, source), [B, N, D] to [B, N, D]: gate and queries of x, keys and values of the source.

    As in `GatedAttentionUnit`, every head has its own gamma and beta over the shared Z, and U and V are split between
    the heads.

    Attributes:
      expanded_dim: E.
      query_key_dim: S.
      num_heads: H, divides E.
      scoring: attention function and normaliser.
      dtype: compute type.
    """

    expanded_dim: int
    query_key_dim: int
    num_heads: int
    scoring: Scoring
    dtype: str

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies the unit to normalised inputs. Raises UserError without a source."""
        source = _source(tokens)

        def projected(x: Array, width: int, axis: str, name: str) -> Array:
            return jax.nn.silu(Linear((width,), ('embed',), (axis,), self.dtype, name=name)(x))

        u_BNE, v_BME = (
            constrain(projected(x, self.expanded_dim, 'expanded', name), 'batch', 'length', 'act_expanded')
            for x, name in ((x_BND, 'u'), (source.h_BMD, 'v'))
        )
        z_BNS = projected(x_BND, self.query_key_dim, 'query_key', 'z')
        z_BMS = projected(source.h_BMD, self.query_key_dim, 'query_key', 'z_key')
        # Without a relative bias the layer would be dead with a small gamma (docs/paper.md section 7, trap 2).
        scale_offset = ScaleOffset(2, self.num_heads, 'ones', 0, self.dtype, name='query_key')
        q_BHNS, k_BHMS = scale_offset(z_BNS, z_BMS, tokens=tokens)
        o_BHNE = _attend(self, q_BHNS, k_BHMS, split_heads(v_BME, self.num_heads), source)
        o_BNE = constrain(u_BNE * merge_heads(o_BHNE), 'batch', 'length', 'act_expanded')
        return Linear((x_BND.shape[-1],), ('expanded',), ('embed',), self.dtype, name='out')(o_BNE)


class CrossMultiHeadAttention(nn.Module):
    """Multi-head cross-attention, [B, N, D] to [B, N, D]: queries of x, keys and values of the source.

    Attributes:
      num_heads: H.
      head_dim: K.
      scoring: attention function and normaliser.
      dtype: compute type.
    """

    num_heads: int
    head_dim: int
    scoring: Scoring
    dtype: str

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies attention to normalised inputs. Raises UserError without a source."""
        source = _source(tokens)

        def projected(x: Array, parts: int, name: str) -> list[Array]:
            features, axes = (parts, self.num_heads, self.head_dim), (None, 'heads', 'head_dim')
            y = Linear(features, ('embed',), axes, self.dtype, name=name)(x)
            return [constrain(part, 'batch', 'act_heads', 'length', None) for part in jnp.transpose(y, (2, 0, 3, 1, 4))]

        (q_BHNK,), (k_BHMK, v_BHMK) = projected(x_BND, 1, 'q'), projected(source.h_BMD, 2, 'kv')
        o_BNHK = _attend(self, q_BHNK, k_BHMK, v_BHMK, source).swapaxes(1, 2)
        return Linear((x_BND.shape[-1],), ('heads', 'head_dim'), ('embed',), self.dtype, name='out')(o_BNHK)


def _source(tokens: TokenInfo) -> Source:
    if tokens.source is None:
        raise UserError(
            'a model with cross-attention needs a source to read: train it with objective=halves or objective=titles'
        )
    return tokens.source


def _attend(layer: nn.Module, q_BHNS: Array, k_BHMS: Array, v_BHME: Array, source: Source) -> Array:
    """Returns A V of every head, [B, H, N, E], each device that of its own rows, heads and queries; makes `bias`."""
    bias_H = None
    if layer.scoring.function not in SOFTMAXES:
        init = nn.with_logical_partitioning(nn.initializers.constant(BIAS_START), ('heads',))
        bias_H = layer.param('bias', init, (layer.num_heads,), param_dtype(layer.dtype))

    def attend(q_BNS, k_BMS, v_BME, bias, *, segment_ids_BN, sequence_axis):
        fields = {'scoring': layer.scoring, 'sequence_axis': sequence_axis}
        return cross_attention(q_BNS, k_BMS, v_BME, segment_ids_BM=segment_ids_BN, bias=bias, **fields)

    arrays = q_BHNS, k_BHMS, v_BHME
    return attention_over_mesh(attend, *arrays, bias=bias_H, segment_ids_BN=source.segment_ids_BM, token_multiple=1)
