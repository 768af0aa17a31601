"""Multi-head attention of the Transformers: softmax, another attention function, or what a baseline puts there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.errors import UserError
from gau.layers.common import Linear, Temperature, TokenInfo, constrain, over_heads, param_dtype
from gau.layers.gated_attention_unit import ScaleOffset
from gau.layers.positions import RelativeBias, bias_in_chunk
from gau.layers.sharding import attention_over_mesh
from gau.layers.state import linear_with_state, mixed_chunk_with_state, quadratic_with_state
from gau.ops.combiner import combiner_attention
from gau.ops.kernels.cudnn_attention import cudnn_attention
from gau.ops.linear_attention import favor_features, linear_attention, orthogonal_directions, relu_features
from gau.ops.linformer import linformer_attention
from gau.ops.mixed_chunk_attention import mixed_chunk_attention
from gau.ops.positions import apply_rope
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring


class MultiHeadAttention(nn.Module):
    """Projections around an attention, [B, N, D] to [B, N, D] and a bias [D] to add; subclasses say which attention.

    Attributes:
      num_heads: H.
      head_dim: K.
      causal: whether later tokens are hidden.
      gate: 'silu' multiplies the attention's output by silu(x Wu), as in a GAU; 'none' does not.
      rope: whether queries and keys are rotated.
      impl: implementation of the op.
      dtype: compute type.
    """

    num_heads: int
    head_dim: int
    causal: bool
    gate: str = 'none'
    rope: bool = True
    impl: str = 'xla'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x_BND: Array, tokens: TokenInfo) -> tuple[Array, Array]:
        """Applies attention to normalised inputs; returns the output [B, N, D] without its bias, and the bias [D]."""
        heads = (self.num_heads, self.head_dim)
        qkv = Linear((3, *heads), ('embed',), (None, 'heads', 'head_dim'), self.dtype, name='qkv')(x_BND)
        q_BHNK, k_BHNK, v_BHNK = (
            constrain(x, 'batch', 'act_heads', 'length', None) for x in jnp.transpose(qkv, (2, 0, 3, 1, 4))
        )
        o_BNHK = self.attend(q_BHNK, k_BHNK, v_BHNK, tokens).swapaxes(1, 2)
        if self.gate == 'silu':
            gate = Linear(heads, ('embed',), ('heads', 'head_dim'), self.dtype, name='gate')(x_BND)
            o_BNHK = jax.nn.silu(gate) * o_BNHK
        project = Linear((x_BND.shape[-1],), ('heads', 'head_dim'), ('embed',), self.dtype, name='out')
        return project(o_BNHK, add_bias=False)

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """Returns the attention's output for projected, not yet rotated queries, keys and values, [B, H, N, K]."""
        raise NotImplementedError

    def rotated(self, x_BHNK: Array, tokens: TokenInfo) -> Array:
        """Rotates queries or keys by position, if the layer does."""
        return apply_rope(x_BHNK, tokens.rope[self.head_dim]) if self.rope else x_BHNK


class QuadraticAttention(MultiHeadAttention):
    """softmax(Q K^T / sqrt(K) + b) V, or another attention function in place of softmax.

    Attributes:
      scoring: attention function and normaliser.
      temperature: 'learned' multiplies q.k by one learned scalar (init 1), 'none' does not.
      relative_bias: 'toeplitz', 'rotary' or 'none'.
      relative_bias_length: positions the Toeplitz table serves.
    """

    scoring: Scoring = Scoring('softmax', None)
    temperature: str = 'none'
    relative_bias: str = 'none'
    relative_bias_length: int = 512

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """See the base class."""

        q_BHNK, k_BHNK = self.heated(self.rotated(q_BHNK, tokens)), self.rotated(k_BHNK, tokens)
        if tokens.at is not None:
            return quadratic_with_state(self, q_BHNK, k_BHNK, v_BHNK, tokens, scoring=self.scoring, bias=self.bias)

        if self.impl == 'cudnn':
            q_BNHK, k_BNHK, v_BNHK = (x.swapaxes(1, 2) for x in (q_BHNK, k_BHNK, v_BHNK))
            o_BNHK = cudnn_attention(q_BNHK, k_BNHK, v_BNHK, causal=self.causal, segment_ids_BN=tokens.segment_ids_BN)
            return o_BNHK.swapaxes(1, 2)

        def attend(q_BNK, k_BNK, v_BNK, bias_P, **tokens_and_axis):
            return quadratic_attention(
                q_BNK,
                k_BNK,
                v_BNK,
                scoring=self.scoring,
                causal=self.causal,
                bias_P=bias_P,
                impl=self.impl,
                **tokens_and_axis,
            )

        return attention_over_mesh(
            attend,
            *(q_BHNK, k_BHNK, v_BHNK),
            bias=self.bias(v_BHNK.shape[2]),
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=None if self.impl == 'reference' else 1,
        )

    def heated(self, q: Array) -> Array:
        """Multiplies q, and with it q.k, by the learned temperature, if there is one."""
        return Temperature(self.temperature, name='temperature')(q)

    def bias(self, n: int, queries_BT: Array | None = None) -> Array | None:
        """Returns the relative bias between n positions by distance, [H, 2 n - 1], or the queries' rows; or None."""
        bias = RelativeBias(
            self.relative_bias,
            self.num_heads,
            self.relative_bias_length,
            self.head_dim,
            self.dtype,
            name='relative_bias',
        )
        return bias(n, queries_BT)


class MixedChunkAttention(QuadraticAttention):
    """Mixed chunk attention in a Transformer (MC-TFM++, docs/paper.md section 4).

    Inside chunks every head has softmax attention; between chunks it has the linear attention of FLASH, whose queries
    and keys are scale-and-offset transforms of the head's own projections, as a GAU's are of its Z.

    Attributes:
      chunk_size: C.
      branches: 'both', 'local' or 'global'.
      global_reduction: 'mean' or 'sum'.
      gamma_init: init of the transforms' scale, 'normal' or 'ones'.
    """

    chunk_size: int = 256
    branches: str = 'both'
    global_reduction: str = 'mean'
    gamma_init: str = 'normal'

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """See the base class."""

        def attend(q_BNK, k_BNK, q_lin_BNK, k_lin_BNK, v_BNK, bias_CC, **tokens_and_axis):
            return mixed_chunk_attention(
                q_BNK,
                k_BNK,
                q_lin_BNK,
                k_lin_BNK,
                v_BNK,
                chunk_size=self.chunk_size,
                scoring=self.scoring,
                causal=self.causal,
                bias_CC=bias_CC,
                branches=self.branches,
                global_reduction=self.global_reduction,
                impl=self.impl,
                **tokens_and_axis,
            )

        q_lin_BHNK, k_lin_BHNK = q_BHNK, k_BHNK
        if self.branches != 'local':
            transform = ScaleOffset(2, self.num_heads, self.gamma_init, self.rope, self.dtype, name='query_key_linear')
            q_lin_BHNK, k_lin_BHNK = transform(q_BHNK, k_BHNK, tokens=tokens)
        if self.branches != 'global':
            q_BHNK, k_BHNK = self.heated(self.rotated(q_BHNK, tokens)), self.rotated(k_BHNK, tokens)
        if tokens.at is not None:
            return mixed_chunk_with_state(
                self,
                *(q_BHNK, k_BHNK, q_lin_BHNK, k_lin_BHNK, v_BHNK),
                tokens,
                bias=self.bias,
                chunk_size=self.chunk_size,
                scoring=self.scoring,
                branches=self.branches,
                global_reduction=self.global_reduction,
            )
        bias_HCC = None
        if self.branches != 'global':
            bias_HCC = bias_in_chunk(self.bias(min(self.chunk_size, v_BHNK.shape[2])))
        return attention_over_mesh(
            attend,
            *(q_BHNK, k_BHNK, q_lin_BHNK, k_lin_BHNK, v_BHNK),
            bias=bias_HCC,
            segment_ids_BN=tokens.segment_ids_BN,
            token_multiple=None if self.impl == 'reference' else self.chunk_size,
        )


class PerformerAttention(MultiHeadAttention):
    """Linear attention through a feature map; queries and keys are rotated before it.

    Attributes:
      feature_map: 'relu' or 'favor'.
      num_features: random features of 'favor'; fixed constants, not trained (see `orthogonal_directions`).
    """

    feature_map: str = 'relu'
    num_features: int | None = None

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """See the base class."""
        q_BHNK, k_BHNK = self.rotated(q_BHNK, tokens), self.rotated(k_BHNK, tokens)
        if self.feature_map == 'relu':
            q_BHNM, k_BHNM, log_scale_BHN = relu_features(q_BHNK), relu_features(k_BHNK), None
        else:
            w_HMK = orthogonal_directions(self.num_features, self.head_dim, self.num_heads)
            (q_BHNM, _), (k_BHNM, log_scale_BHN) = (
                jax.vmap(favor_features, (1, 0), 1)(x, w_HMK) for x in (q_BHNK, k_BHNK)
            )

        if tokens.at is not None:
            return linear_with_state(self, q_BHNM, k_BHNM, v_BHNK, log_scale_BHN, tokens)

        def attend(q_BNM, k_BNM, v_BNK, log_scale_BN, _):
            return linear_attention(
                q_BNM,
                k_BNM,
                v_BNK,
                causal=self.causal,
                key_log_scale_BN=log_scale_BN,
                segment_ids_BN=tokens.segment_ids_BN,
                impl=self.impl,
            )

        return over_heads(attend, q_BHNM, k_BHNM, v_BHNK, log_scale_BHN, bias=None)


class LinformerAttention(MultiHeadAttention):
    """Attention to R slots, learned mixtures along the sequence, shared by the heads of a layer.

    Attributes:
      projection_rank: R.
      projection_length: longest document the projections serve.
    """

    projection_rank: int = 256
    projection_length: int = 512

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """See the base class.

        Raises:
          UserError: the sequence is longer than the projections.
          ValueError: the layer is causal.
        """
        n = v_BHNK.shape[2]
        if self.causal:
            raise ValueError('Linformer has no causal form')
        if n > self.projection_length:
            raise UserError(f'Linformer projects up to {self.projection_length} tokens (projection_length), not {n}')
        q_BHNK, k_BHNK = self.rotated(q_BHNK, tokens), self.rotated(k_BHNK, tokens)
        shape = (self.projection_length, self.projection_rank)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.projection_length**-0.5), ('position', None))
        e_BNR, f_BNR = (
            self.param(name, init, shape, param_dtype(self.dtype))[tokens.positions_BN]
            for name in ('key_projection', 'value_projection')
        )

        def attend(q_BNK, k_BNK, v_BNK, _):
            return linformer_attention(
                q_BNK, k_BNK, v_BNK, e_BNR, f_BNR, segment_ids_BN=tokens.segment_ids_BN, impl=self.impl
            )

        return over_heads(attend, q_BHNK, k_BHNK, v_BHNK, bias=None)


class CombinerAttention(MultiHeadAttention):
    """Combiner's factorised attention, axial and row-major (see `gau.ops.combiner`).

    Attributes:
      chunk_size: tokens in a row.
    """

    chunk_size: int = 32

    def attend(self, q_BHNK: Array, k_BHNK: Array, v_BHNK: Array, tokens: TokenInfo) -> Array:
        """See the base class."""

        def attend(q_BNK, k_BNK, v_BNK, _):
            return combiner_attention(
                q_BNK,
                k_BNK,
                v_BNK,
                row_length=self.chunk_size,
                causal=self.causal,
                segment_ids_BN=tokens.segment_ids_BN,
            )

        return over_heads(attend, self.rotated(q_BHNK, tokens), self.rotated(k_BHNK, tokens), v_BHNK, bias=None)
