"""The Gated Attention Unit: FLASH-Quad with quadratic attention in it, FLASH with mixed chunk attention.

docs/paper.md sections 1 and 3, with X the normalised input:

    U = silu(X Wu)   V = silu(X Wv)   Z = silu(X Wz)
    Q = rope(Z * gamma_q + beta_q)    K = rope(Z * gamma_k + beta_k)
    A = relu(Q K^T / n + b)^2          (gau.layers.quadratic, then gau.ops.quadratic_attention and gau.ops.scores)
    O = (U * (A V)) Wo

In FLASH `A V` is the sum of the same attention inside chunks and of a linear attention between them, whose queries and
keys are two further transforms of Z (gau.layers.mixed_chunk). `gau.layers.fused_unit` computes the same in kernels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gau.layers.common import Linear, TokenInfo, constrain, param_dtype
from gau.layers.core import AttentionCore
from gau.layers.short_convolution import KeyShift
from gau.ops.positions import apply_rope

GAMMA_INITS = {'normal': nn.initializers.normal(0.02), 'ones': nn.initializers.ones}


class GatedAttentionUnit(nn.Module):
    """GAU(x), [B, N, D] to [B, N, D]; the block around it adds norm and residual.

    Wu and Wv are one kernel [D, 2, E] and Wz its own [D, S]: the paper's single dense layer D -> 2E + S cut in two, so
    that E can be spread over devices while the small S stays whole. Every head has its own gamma, beta and bias over
    the shared Z (full width S), and V and U are split between the heads.

    Attributes:
      core: the attention.
      expanded_dim: E.
      query_key_dim: S.
      num_heads: H, divides E.
      gate: 'silu', or 'none' for U = 1 (then there is no Wu).
      gamma_init: 'normal' or 'ones'.
      rope: which queries and keys are rotated: 'rotary': all; 'local': those of the core's direct pair; 'none'.
      key_input: what the keys are transforms of: 'shared': the Z of the queries, as in the paper; 'shifted': Z mixed
        with that of the token before (`KeyShift`); 'own': a projection of their own.
      dtype: compute type.
    """

    core: AttentionCore
    expanded_dim: int
    query_key_dim: int
    num_heads: int = 1
    gate: str = 'silu'
    gamma_init: str = 'normal'
    rope: str = 'rotary'
    key_input: str = 'shared'
    dtype: str = 'float32'

    def setup(self):
        """Lets the core's parameters stand beside the unit's own."""
        nn.share_scope(self, self.core)

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> Array:
        """Applies the unit to normalised inputs."""
        gated, e = self.gate == 'silu', self.expanded_dim
        uv_BN2E = jax.nn.silu(Linear((1 + gated, e), ('embed',), (None, 'expanded'), self.dtype, name='uv')(x_BND))
        uv_BN2E = constrain(uv_BN2E, 'batch', 'length', None, 'act_expanded')
        # Without a gate there is V alone.
        u_BNE, v_BNE = uv_BN2E[:, :, 0] if gated else None, uv_BN2E[:, :, -1]
        # Q and K; in FLASH also Q_lin and K_lin.
        queries_keys = self.scale_offset(ScaleOffset)(*self.of_queries_and_keys(x_BND, tokens), tokens=tokens)

        inputs = [x_BND] if self.core.reads_input else []
        av_BNE = merge_heads(self.core(queries_keys, split_heads(v_BNE, self.num_heads), tokens, *inputs))

        o_BNE = constrain(u_BNE * av_BNE if gated else av_BNE, 'batch', 'length', 'act_expanded')
        return Linear((x_BND.shape[-1],), ('expanded',), ('embed',), self.dtype, name='out')(o_BNE)

    def of_queries_and_keys(self, x_BND: Array, tokens: TokenInfo) -> list[Array]:
        """Returns what queries and keys are transforms of: Z, [B, N, S], or one array for each of them."""

        def projected(name):
            return jax.nn.silu(Linear((self.query_key_dim,), ('embed',), ('query_key',), self.dtype, name=name)(x_BND))

        z_BNS = projected('z')
        if self.key_input == 'shared':
            return [z_BNS]
        of_keys_BNS = (
            projected('z_key') if self.key_input == 'own' else KeyShift(self.dtype, name='key_shift')(z_BNS, tokens)
        )
        return [z_BNS, of_keys_BNS] * len(self.core.pairs)

    def scale_offset(self, kind: type['ScaleOffset']) -> 'ScaleOffset':
        """Returns the module that makes queries and keys of Z."""
        roles = 2 * len(self.core.pairs)
        rotated = {'rotary': roles, 'local': 2, 'none': 0}[self.rope]
        # The far pair has no relative bias: nothing else would tell its keys apart at the start.
        ones = tuple(role for role in range(roles) if self.core.pairs[role // 2] == 'far')
        return kind(roles, self.num_heads, self.gamma_init, rotated, self.dtype, ones, name='query_key')


def split_heads(x_BNE: Array, num_heads: int) -> Array:
    """Returns [B, N, E] as [B, H, N, E / H]."""
    return x_BNE.reshape(*x_BNE.shape[:2], num_heads, -1).swapaxes(1, 2)


def merge_heads(x_BHNE: Array) -> Array:
    """Returns [B, H, N, E / H] as [B, N, E]."""
    x_BNHE = x_BHNE.swapaxes(1, 2)
    return x_BNHE.reshape(*x_BNHE.shape[:2], -1)


class ScaleOffset(nn.Module):
    """Cheap queries and keys: x * gamma + beta for each of R `roles`, for every head, the first rotated by position.

    Attributes:
      roles: R, how many transforms (Q and K: 2).
      num_heads: H.
      gamma_init: 'normal' N(0, 0.02) or 'ones'.
      rotated: how many of the results, the first ones, are rotated.
      dtype: compute type.
      ones: roles whose gamma starts as ones, whatever `gamma_init` says.
    """

    roles: int
    num_heads: int
    gamma_init: str
    rotated: int
    dtype: str
    ones: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, *x: Array, tokens: TokenInfo) -> list[Array]:
        """Maps [B, N, S], or [B, H, N, S], to R arrays [B, H, N, S].

        One x serves all roles; else one is given for each role.
        """
        width = x[0].shape[-1]
        gamma_RHS, beta_RHS = (parameter.astype(self.dtype) for parameter in self.parameters(width))
        results = []
        for role in range(self.roles):
            x_BHNS = x[role if len(x) > 1 else 0]
            x_BHNS = x_BHNS if x_BHNS.ndim == 4 else x_BHNS[:, None]
            y_BHNS = x_BHNS * gamma_RHS[role][:, None] + beta_RHS[role][:, None]
            results.append(apply_rope(y_BHNS, tokens.rope[width]) if role < self.rotated else y_BHNS)
        return results

    def parameters(self, width: int) -> list[Array]:
        """Returns gamma and beta, [R, H, S] each."""
        shape, axes, dtype = (self.roles, self.num_heads, width), (None, 'heads', 'query_key'), param_dtype(self.dtype)
        inits = {'gamma': self._gamma_init, 'beta': nn.initializers.zeros}
        return [
            self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype) for name, init in inits.items()
        ]

    def _gamma_init(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        gamma_RHS = GAMMA_INITS[self.gamma_init](key, shape, dtype)
        return gamma_RHS.at[np.asarray(self.ones, int)].set(1)
