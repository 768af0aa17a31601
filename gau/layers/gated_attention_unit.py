"""The Gated Attention Unit, with quadratic attention (FLASH-Quad) or with mixed chunk attention (FLASH).

Paper.md sections 1 and 3, with X the normalised input:

    U = silu(X Wu)   V = silu(X Wv)   Z = silu(X Wz)
    Q = rope(Z * gamma_q + beta_q)    K = rope(Z * gamma_k + beta_k)
    A = relu(Q K^T / n + b)^2
    O = (U * (A V)) Wo

In FLASH `A V` is the sum of the same attention inside chunks and of a linear attention between them, whose queries and
keys are two further transforms of Z.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.layers.common import Linear, Temperature, TokenInfo, Weights, constrain, param_dtype
from gau.layers.positions import RelativeBias, bias_in_chunk
from gau.layers.sharding import attention_over_mesh, over_mesh, parts_of
from gau.layers.state import mixed_chunk_with_state, quadratic_with_state
from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
from gau.ops.kernels.gated_quadratic import gated_quadratic_attention
from gau.ops.kernels.queries_keys import queries_and_keys
from gau.ops.mixed_chunk_attention import mixed_chunk_attention
from gau.ops.positions import apply_rope
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring

GAMMA_INITS = {'normal': nn.initializers.normal(0.02), 'ones': nn.initializers.ones}


class ScaleOffset(nn.Module):
    """Cheap queries and keys: x * gamma + beta for each of `roles`, for every head, rotated by position if asked.

    Attributes:
      roles: how many transforms (Q and K: 2).
      num_heads: H.
      gamma_init: 'normal' N(0, 0.02) or 'ones'.
      rope: whether to rotate the results.
      dtype: compute type.
    """

    roles: int
    num_heads: int
    gamma_init: str
    rope: bool
    dtype: str

    @nn.compact
    def __call__(self, *x: Array, tokens: TokenInfo) -> list[Array]:
        """Maps [B, N, S], or [B, H, N, S], to `roles` arrays [B, H, N, S].

        One x serves all roles; else one is given for each role.
        """
        width = x[0].shape[-1]
        gamma, beta = (parameter.astype(self.dtype) for parameter in self._parameters(width))
        results = []
        for role in range(self.roles):
            x_BHNS = x[role if len(x) > 1 else 0]
            x_BHNS = x_BHNS if x_BHNS.ndim == 4 else x_BHNS[:, None]
            y_BHNS = x_BHNS * gamma[role][:, None] + beta[role][:, None]
            results.append(apply_rope(y_BHNS, tokens.rope[width]) if self.rope else y_BHNS)
        return results

    def _parameters(self, width: int) -> list[Array]:
        shape, axes, dtype = (self.roles, self.num_heads, width), (None, 'heads', 'query_key'), param_dtype(self.dtype)
        inits = {'gamma': GAMMA_INITS[self.gamma_init], 'beta': nn.initializers.zeros}
        return [
            self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype) for name, init in inits.items()
        ]


class FusedScaleOffset(ScaleOffset):
    """A `ScaleOffset` of one head, with the bias and silu before it in the same kernel."""

    @nn.compact
    def __call__(self, p_BNW: Array, bias_S: Array, tokens: TokenInfo) -> tuple[tuple[Array, ...], Array]:
        """Maps a projection, the last S columns of p, to `roles` arrays [B, N, S]; and returns p to go on with.

        See `gau.ops.queries_keys`.
        """
        gamma_RS, beta_RS = (parameter[:, 0] for parameter in self._parameters(bias_S.size))
        table = tokens.rope[bias_S.size] if self.rope else (None, None)

        def op(p_BNW, bias_S, gamma_RS, beta_RS, cos_BNh, sin_BNh, *, sequence_axis):
            del sequence_axis  # Every token by itself.
            table = None if cos_BNh is None else (cos_BNh, sin_BNh)
            return queries_and_keys(p_BNW, bias_S, gamma_RS, beta_RS, table)

        by_token = ('batch', 'length', None)
        return over_mesh(
            op,
            *(p_BNW, bias_S, gamma_RS, beta_RS, *table),
            axes=[by_token, (None,), (None, None), (None, None), by_token, by_token],
            result_like=0,
            token_multiple=1,
        )


class GatedAttentionUnit(nn.Module):
    """GAU(x), [B, N, D] to [B, N, D] and a bias [D] to add; the block around it adds norm and residual.

    Wu and Wv are one kernel [D, 2, E] and Wz its own [D, S]: the paper's single dense layer D -> 2E + S cut in two, so
    that E can be spread over devices while the small S stays whole; where nothing is spread the kernels of a GPU get
    one product. Every head has its own gamma, beta and bias over the shared Z (full width S), and V and U are split
    between the heads.

    Attributes:
      expanded_dim: E.
      query_key_dim: S.
      causal: whether later tokens are hidden.
      num_heads: H, divides E.
      chunk_size: C of mixed chunk attention (FLASH); None for quadratic attention (FLASH-Quad).
      branches: with chunks: 'both', 'local' or 'global'.
      global_reduction: with chunks: 'mean' or 'sum'.
      scoring: attention function and normaliser.
      temperature: 'learned' multiplies q.k by one learned scalar (init 1), 'none' does not.
      gate: 'silu', or 'none' for U = 1 (then there is no Wu, and of 'triton' only the attention's kernels are used).
      gamma_init: 'normal' or 'ones'.
      relative_bias: 'toeplitz', 'rotary' or 'none'.
      relative_bias_length: positions the Toeplitz table serves.
      rope: whether queries and keys are rotated.
      impl: implementation of the op.
      dtype: compute type.
    """

    expanded_dim: int
    query_key_dim: int
    causal: bool
    num_heads: int = 1
    chunk_size: int | None = None
    branches: str = 'both'
    global_reduction: str = 'mean'
    scoring: Scoring = Scoring()
    temperature: str = 'none'
    gate: str = 'silu'
    gamma_init: str = 'normal'
    relative_bias: str = 'toeplitz'
    relative_bias_length: int = 512
    rope: bool = True
    impl: str = 'xla'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> tuple[Array, Array]:
        """Applies the unit to normalised inputs; returns the output [B, N, D] without its bias, and the bias [D]."""
        batch, n, width = x_BND.shape
        gated = self.gate == 'silu'
        project_o = Linear((width,), ('expanded',), ('embed',), self.dtype, name='out')
        roles = 4 if self.chunk_size and self.branches == 'both' else 2
        role_fields = roles, self.num_heads, self.gamma_init, self.rope, self.dtype
        uv_fields = (1 + gated, self.expanded_dim), ('embed',), (None, 'expanded'), self.dtype
        z_fields = (self.query_key_dim,), ('embed',), ('query_key',), self.dtype
        if self.impl == 'triton' and tokens.at is None and (self.chunk_size or gated):
            uv, z = Weights(*uv_fields, name='uv')(x_BND), Weights(*z_fields, name='z')(x_BND)
            o_BNE = self._fused(x_BND, uv, z, FusedScaleOffset(*role_fields, name='query_key'), tokens)
            return project_o(o_BNE, add_bias=False)

        uv = constrain(jax.nn.silu(Linear(*uv_fields, name='uv')(x_BND)), 'batch', 'length', None, 'act_expanded')
        queries_keys = ScaleOffset(*role_fields, name='query_key')(
            jax.nn.silu(Linear(*z_fields, name='z')(x_BND)), tokens=tokens
        )
        v_BNE = uv[:, :, -1]
        v_BHNE = v_BNE.reshape(batch, n, self.num_heads, -1).swapaxes(1, 2)
        attend = self._mixed_chunk if self.chunk_size else self._quadratic
        o_BHNE = attend(queries_keys, v_BHNE, tokens)
        o_BNE = o_BHNE.swapaxes(1, 2).reshape(batch, n, self.expanded_dim)

        if gated:
            o_BNE = uv[:, :, 0] * o_BNE
        o_BNE = constrain(o_BNE, 'batch', 'length', 'act_expanded')
        return project_o(o_BNE, add_bias=False)

    def _quadratic(self, queries_keys: list[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        q_BHNS, k_BHNS = queries_keys
        q_BHNS = self._heated(q_BHNS)
        if tokens.at is not None:
            return quadratic_with_state(self, q_BHNS, k_BHNS, v_BHNE, tokens, scoring=self.scoring, bias=self._bias)

        def attend(q_BNS, k_BNS, v_BNE, bias_P, **tokens_and_axis):
            return quadratic_attention(
                q_BNS,
                k_BNS,
                v_BNE,
                scoring=self.scoring,
                causal=self.causal,
                bias_P=bias_P,
                impl=self.impl,
                **tokens_and_axis,
            )

        return attention_over_mesh(
            attend,
            *(q_BHNS, k_BHNS, v_BHNE),
            bias=self._bias(v_BHNE.shape[2]),
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=1 if self.impl == 'xla' else None,
        )

    def _mixed_chunk(self, queries_keys: list[Array], v_BHNE: Array, tokens: TokenInfo) -> Array:
        # With one branch alone the other's do not exist; the op does not read them.
        q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS = queries_keys if self.branches == 'both' else queries_keys * 2
        if self.branches != 'global':
            q_BHNS = self._heated(q_BHNS)
        if tokens.at is not None:
            return mixed_chunk_with_state(
                self,
                *(q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS, v_BHNE),
                tokens,
                bias=self._bias,
                chunk_size=self.chunk_size,
                scoring=self.scoring,
                branches=self.branches,
                global_reduction=self.global_reduction,
            )
        bias_HCC = None
        if self.branches != 'global':
            bias_HCC = bias_in_chunk(self._bias(min(self.chunk_size, v_BHNE.shape[2])))

        def attend(q_BNS, k_BNS, q_lin_BNS, k_lin_BNS, v_BNE, bias_CC, **tokens_and_axis):
            return mixed_chunk_attention(
                q_BNS,
                k_BNS,
                q_lin_BNS,
                k_lin_BNS,
                v_BNE,
                chunk_size=self.chunk_size,
                scoring=self.scoring,
                causal=self.causal,
                bias_CC=bias_CC,
                branches=self.branches,
                global_reduction=self.global_reduction,
                impl=self.impl,
                **tokens_and_axis,
            )

        return attention_over_mesh(
            attend,
            *(q_BHNS, k_BHNS, q_lin_BHNS, k_lin_BHNS, v_BHNE),
            bias=bias_HCC,
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=self.chunk_size if self.impl == 'xla' else None,
        )

    def _fused(
        self,
        x_BND: Array,
        uv: tuple[Array, Array],
        z: tuple[Array, Array],
        scale_offset: FusedScaleOffset,
        tokens: TokenInfo,
    ) -> Array:
        """Applies ops that have the activations and the gate in them, for one head, on every device's own texts.

        Args:
          x_BND: normalised inputs.
          uv: kernel and bias of the projections of gate and values.
          z: the same for queries and keys.
          scale_offset: makes them of their projection.
          tokens: what all layers know of the tokens.
        """
        # `gau.models.implementations` takes them for nothing else.
        assert self.num_heads == 1
        assert self.branches == 'both'
        (uv_D2E, bias_2E), (z_DS, bias_S) = uv, z
        if parts_of('act_expanded') == 1:
            # One product: its gradient for x needs no second pass to add two of them up.
            joined_DW = jnp.concatenate([uv_D2E.reshape(len(uv_D2E), -1), z_DS], axis=1)
            queries_keys, p = scale_offset(x_BND @ joined_DW, bias_S, tokens)
        else:
            # U and V are cut over devices, Z is not.
            queries_keys, _ = scale_offset(x_BND @ z_DS, bias_S, tokens)
            p = jnp.tensordot(x_BND, uv_D2E, axes=1)
        if self.chunk_size:
            op, length = gated_mixed_chunk, min(self.chunk_size, x_BND.shape[1])
            fields = {'chunk_size': self.chunk_size, 'global_reduction': self.global_reduction}
        else:
            op, length, fields = gated_quadratic_attention, x_BND.shape[1], {}
        fields |= {'scoring': self.scoring, 'causal': self.causal}
        bias_HP = self._bias(length)

        def attend(p, *operands, sequence_axis):
            del sequence_axis  # Tokens stay whole: see token_multiple.
            *arrays, bias_P, segment_ids_BN = operands
            p_BNW = p.reshape(*p.shape[:2], -1)
            return op(p_BNW, *arrays, segment_ids_BN=segment_ids_BN, bias_P=bias_P, **fields)

        q_BNS, *others = queries_keys
        by_token = ('batch', 'length', None)
        columns = (None,) if p.ndim == 3 else (None, 'act_expanded')
        return over_mesh(
            attend,
            *(p, bias_2E, self._heated(q_BNS), *others),
            None if bias_HP is None else bias_HP[0],
            tokens.segment_ids_BN,
            axes=[
                ('batch', 'length', *columns),
                (None, columns[-1]),
                *[by_token] * len(queries_keys),
                (None,),
                ('batch', 'length'),
            ],
            result_like=0,
            result_axes=('batch', 'length', columns[-1]),
            token_multiple=None,
        )

    def _heated(self, q: Array) -> Array:
        return Temperature(self.temperature, name='temperature')(q)

    def _bias(self, n: int, queries_BT: Array | None = None) -> Array | None:
        bias = RelativeBias(
            self.relative_bias,
            self.num_heads,
            self.relative_bias_length,
            self.query_key_dim,
            self.dtype,
            name='relative_bias',
        )
        return bias(n, queries_BT)
