"""The multi-head attention layer of the Transformers, around any attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.layers.common import Linear, TokenInfo, constrain
from gau.layers.core import AttentionCore
from gau.layers.gated_attention_unit import ScaleOffset
from gau.ops.positions import apply_rope


class MultiHeadAttention(nn.Module):
    """Projections around an attention, [B, N, D] to [B, N, D].

    Attributes:
      core: the attention.
      num_heads: H.
      head_dim: K.
      gate: 'silu' multiplies the attention's output by silu(x Wu), as in a GAU; 'none' does not.
      gamma_init: of the scale-and-offset transforms that make a linear pair of queries and keys, where the core takes
        one: 'normal' or 'ones'.
      rope: which queries and keys are rotated: 'rotary': all; 'local': those of the core's direct pair; 'none'.
      dtype: compute type.
    """

    core: AttentionCore
    num_heads: int
    head_dim: int
    gate: str = 'none'
    gamma_init: str = 'normal'
    rope: str = 'rotary'
    dtype: str = 'float32'

    def setup(self):
        """Lets the core's parameters stand beside the layer's own."""
        nn.share_scope(self, self.core)

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies attention to normalised inputs."""
        heads = (self.num_heads, self.head_dim)
        qkv = Linear((3, *heads), ('embed',), (None, 'heads', 'head_dim'), self.dtype, name='qkv')(x_BND)
        q_BHNK, k_BHNK, v_BHNK = (
            constrain(x, 'batch', 'act_heads', 'length', None) for x in jnp.transpose(qkv, (2, 0, 3, 1, 4))
        )
        pairs = {}
        if 'linear' in self.core.pairs:
            rotated = 2 if self.rope == 'rotary' else 0
            transform = ScaleOffset(2, self.num_heads, self.gamma_init, rotated, self.dtype, name='query_key_linear')
            pairs['linear'] = transform(q_BHNK, k_BHNK, tokens=tokens)
        if 'direct' in self.core.pairs:
            rotate = (lambda x: apply_rope(x, tokens.rope[self.head_dim])) if self.rope != 'none' else (lambda x: x)
            pairs['direct'] = [rotate(q_BHNK), rotate(k_BHNK)]
        queries_keys = [x_BHNK for name in self.core.pairs for x_BHNK in pairs[name]]

        o_BNHK = self.core(queries_keys, v_BHNK, tokens).swapaxes(1, 2)

        if self.gate == 'silu':
            gate_BNHK = Linear(heads, ('embed',), ('heads', 'head_dim'), self.dtype, name='gate')(x_BND)
            o_BNHK = jax.nn.silu(gate_BNHK) * o_BNHK
        return Linear((x_BND.shape[-1],), ('heads', 'head_dim'), ('embed',), self.dtype, name='out')(o_BNHK)
