"""Multi-head attention of the Transformers: softmax, or any other attention function of `gau.ops.scores`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.layers.common import Linear, Temperature, TokenInfo, constrain, over_heads
from gau.layers.positions import RelativeBias
from gau.ops.positions import apply_rope
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(K) + b) V for every head, [B, N, D] to [B, N, D]; subclasses put another attention there.

    Attributes:
      num_heads: H.
      head_dim: K.
      causal: whether later tokens are hidden.
      scoring: attention function and normaliser.
      temperature: 'learned' multiplies q.k by one learned scalar (init 1), 'none' does not.
      gate: 'silu' multiplies the attention's output by silu(x Wu), as in a GAU; 'none' does not.
      relative_bias: 'toeplitz', 'rotary' or 'none'.
      relative_bias_length: positions the Toeplitz table serves.
      rope: whether queries and keys are rotated.
      impl: implementation of the op.
      dtype: compute type.
    """

    num_heads: int
    head_dim: int
    causal: bool
    scoring: Scoring = Scoring('softmax', None)
    temperature: str = 'none'
    gate: str = 'none'
    relative_bias: str = 'none'
    relative_bias_length: int = 512
    rope: bool = True
    impl: str = 'xla'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies attention to normalised inputs."""
        heads = (self.num_heads, self.head_dim)
        qkv = Linear((3, *heads), ('embed',), (None, 'heads', 'head_dim'), self.dtype, name='qkv')(x_BND)
        q_BHNK, k_BHNK, v_BHNK = (
            constrain(x, 'batch', 'act_heads', 'length', None) for x in jnp.transpose(qkv, (2, 0, 3, 1, 4))
        )
        o_BHNK = self.attend(q_BHNK, k_BHNK, v_BHNK, tokens)
        o_BNHK = o_BHNK.swapaxes(1, 2)
        if self.gate == 'silu':
            gate = Linear(heads, ('embed',), ('heads', 'head_dim'), self.dtype, name='gate')(x_BND)
            o_BNHK = jax.nn.silu(gate) * o_BNHK
        return Linear((x_BND.shape[-1],), ('heads', 'head_dim'), ('embed',), self.dtype, name='out')(o_BNHK)

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """Returns the attention's output for projected (not yet rotated) queries, keys and values, [B, H, N, K]."""
        q_BHNK, k_BHNK = self.rotated(q_BHNK, tokens), self.rotated(k_BHNK, tokens)

        def attend(q_BNK, k_BNK, v_BNK, bias_NN):
            return quadratic_attention(
                q_BNK,
                k_BNK,
                v_BNK,
                scoring=self.scoring,
                causal=self.causal,
                segment_ids_BN=tokens.segment_ids_BN,
                bias_NN=bias_NN,
                impl=self.impl,
            )

        return over_heads(attend, self.heated(q_BHNK), k_BHNK, v_BHNK, bias_HNN=self.bias(v_BHNK.shape[2]))

    def rotated(self, x_BHNK: Array, tokens: TokenInfo) -> Array:
        """Rotates queries or keys by position, if the layer does."""
        return apply_rope(x_BHNK, tokens.rope[self.head_dim]) if self.rope else x_BHNK

    def heated(self, q: Array) -> Array:
        """Multiplies q, and with it q.k, by the learned temperature, if there is one."""
        return Temperature(self.temperature, name='temperature')(q)

    def bias(self, n: int) -> Array | None:
        """Returns the relative position bias for n positions, [H, n, n], if there is one."""
        bias = RelativeBias(
            self.relative_bias,
            self.num_heads,
            self.relative_bias_length,
            self.head_dim,
            self.dtype,
            name='relative_bias',
        )
        return bias(n)
