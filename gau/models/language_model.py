"""The language model around the blocks: embedding, positions, the stack of layers, the output layer and its loss."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gau.layers.common import KERNEL_INIT, Source, TokenInfo, constrain, param_dtype
from gau.layers.fused_norm import FusedScaleNorm, Residual
from gau.layers.norm import Norm
from gau.layers.positions import ScaledSinusoid
from gau.layers.sharding import devices_together, parts_of, sum_over_mesh
from gau.models.architectures import ARCHITECTURES
from gau.models.blocks import Block
from gau.models.fused_block import FusedBlock, first_residual
from gau.models.target import Implementation
from gau.ops.cross_entropy import output_logits, sliced_cross_entropy, weighted_cross_entropy
from gau.ops.decoding import DecodePosition
from gau.ops.kernels.cross_entropy import slice_loss
from gau.ops.masks import clear_padding
from gau.ops.positions import rope_table
from gau.ops.tracing import choose

REMAT_POLICIES = {
    'full': None,
    'dots': jax.checkpoint_policies.dots_saveable,
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Embedding(nn.Module):
    """A matrix [V, D] ~ N(0, 0.02) that is embedding, output layer, or both."""

    vocab_size: int
    width: int
    dtype: str

    def setup(self):
        """Makes the one parameter."""
        init = nn.with_logical_partitioning(KERNEL_INIT, ('vocab', 'embed'))
        self.kernel = self.param('kernel', init, (self.vocab_size, self.width), param_dtype(self.dtype))

    def __call__(self, tokens_BN: Array) -> Array:
        """Returns the vectors of these tokens, [B, N, D]."""
        return self.rows()[tokens_BN].astype(self.dtype)

    def rows(self) -> Array:
        """Returns the matrix with whole rows on every device: gathered once, not for each use of a part of it."""
        return constrain(self.kernel, 'vocab', None)


def output_matrix(params: Mapping[str, Any]) -> Array:
    """Returns the output layer, [V, D], of the parameters of a `LanguageModel`."""
    return params.get('output', params['embedding'])['kernel']


class LanguageModel(nn.Module):
    """Any model of the registry, causal (LM) or bidirectional (MLM).

    `extend` is decoding (`gau.models.decoding`); `__call__`, `token_losses`,
    `weighted_loss` and `hidden` take whole sequences:
      tokens_BN: integer tokens in [0, V).
      segment_ids_BN: integers; 0 is padding, a positive number names the token's document, and documents do not see
        each other. None: all one document.
      positions_BN: integer position of each token in its document; None: 0, 1, ... N - 1.
      deterministic: False turns dropout on, which draws from the 'dropout' stream.

    Attributes:
      config: resolved model config (`gau.models.config.resolve`), frozen.
      vocab_size: V.
      causal: whether later tokens are hidden.
      implementation: what it is built with (`registry.build`).
    """

    config: Any
    vocab_size: int
    causal: bool
    implementation: Implementation

    def setup(self):
        """Makes `embedding`, `position`, `blocks` (or `blocks_0`, `blocks_1`, ...), `final_norm` and `output`."""
        config = self.config
        fused = choose(self.implementation.norm, {'xla': False, 'recomputed': False, 'triton': True})
        self.embedding = Embedding(self.vocab_size, config.model_dim, config.dtype)
        if config.output_layer == 'own':
            # Its parameter is made where it is read: a classifier around the model has none.
            self.output = Embedding(self.vocab_size, config.model_dim, config.dtype)
        if config.absolute_position == 'sinusoid':
            self.position = ScaledSinusoid(config.dtype)
        if config.norm_placement != 'post':
            self.final_norm = (FusedScaleNorm if fused else Norm)(config.norm, config.model_dim, config.dtype)
        self.dropout = nn.Dropout(config.dropout_rate)
        scan = config.layer_stack == 'scan'
        block = FusedBlock if fused else Block
        if config.remat != 'none':
            # Static argument 3 is `deterministic` (self, x and tokens come before it).
            policy = REMAT_POLICIES[config.remat]
            block = nn.remat(block, policy=policy, prevent_cse=not scan, static_argnums=(3,))
        if scan:
            stack = nn.scan(
                block,
                variable_axes={'params': 0, 'cache': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=config.num_layers,
                metadata_params={nn.PARTITION_NAME: 'layers'},
            )
            self.blocks = stack(config, 0, self.causal, self.implementation)
        else:
            self.blocks = [block(config, layer, self.causal, self.implementation) for layer in range(config.num_layers)]

    def __call__(self, tokens_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True) -> Array:
        """Returns logits [B, N, V], float32 (float64 where the model computes in it)."""
        h_BND = self.hidden(
            tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN, deterministic=deterministic
        )
        return self.logits(h_BND)

    def token_losses(
        self, tokens_BN, targets_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True
    ) -> Array:
        """Returns -log p(target) in nats for every position, [B, N], float32; logits exist a slice at a time.

        Positions that do not count (padding, unmasked tokens) are for the caller to leave out.
        """
        h_BND = self.hidden(
            tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN, deterministic=deterministic
        )
        return self.losses(h_BND, targets_BN)

    def weighted_loss(
        self, tokens_BN, targets_BN, weights_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True
    ) -> Array:
        """Returns the sum of weights times `token_losses`, float32 (float64): what training differentiates.

        Its gradient takes less time and memory than that of `token_losses`; to the weights there is none.
        """
        h_BND = self.hidden(
            tokens_BN, segment_ids_BN=segment_ids_BN, positions_BN=positions_BN, deterministic=deterministic
        )
        return self.weighted_losses(h_BND, targets_BN, weights_BN)

    def hidden(
        self, tokens_BN, *, segment_ids_BN=None, positions_BN=None, deterministic=True, source: Source | None = None
    ) -> Array:
        """Returns what the output layer reads, [B, N, D] in the compute type; finite at padding.

        `source` is for layers that read a second sequence (`gau.models.encoder_decoder`).
        """
        if positions_BN is None:
            positions_BN = jnp.arange(tokens_BN.shape[1])[None]
        tables = self._rope_tables(positions_BN)
        return self._stack(tokens_BN, TokenInfo(segment_ids_BN, positions_BN, tables, source=source), deterministic)

    def embedded(self, tokens_BN: Array) -> Array:
        """Returns what the residual stream begins with, without positions, [B, N, D] in the compute type."""
        return self.embedding(tokens_BN)

    def extend(self, tokens_BT: Array, position: DecodePosition) -> Array:
        """Goes on with sequences whose beginnings are summed up in the collection 'cache' (`gau.models.decoding`).

        Args:
          tokens_BT: the next tokens of each row's sequence, padded on the right.
          position: where they stand, and how many of them are the row's.

        Returns:
          What the output layer reads, [B, T, D] in the compute type; meaningless at padding.
        """
        n = tokens_BT.shape[1]
        positions_BT = position.positions_BT(n)
        # A whole block has its padding after all that is read.
        ids_BT = None if position.whole else position.real_BT(n)
        return self._stack(
            tokens_BT,
            TokenInfo(ids_BT, positions_BT, self._rope_tables(positions_BT), position),
            deterministic=True,
        )

    def logits(self, h_BND: Array) -> Array:
        """Returns the logits of what `hidden` or `extend` returned, [B, N, V], float32 (float64)."""
        return output_logits(h_BND, self._output.kernel)

    def losses(self, h_BND: Array, targets_BN: Array) -> Array:
        """Returns -log p(target) in nats for what `hidden` or `extend` returned, [B, N], float32 (float64)."""
        return sliced_cross_entropy(
            *(h_BND, self._output.rows(), targets_BN),
            positions_per_slice=self.config.vocab_loss_slice,
            devices=devices_together(),
        )

    def weighted_losses(self, h_BND: Array, targets_BN: Array, weights_BN: Array) -> Array:
        """Returns the sum of weights times `losses`, float32 (float64); see `weighted_loss`."""

        def loss(*operands, alone):
            return weighted_cross_entropy(
                *operands,
                positions_per_slice=self.config.vocab_loss_slice,
                devices=devices_together(),
                slice_loss=slice_loss(self.implementation.loss if alone else 'xla', self.vocab_size),
            )

        operands = h_BND, self._output.rows(), targets_BN, weights_BN
        if parts_of('vocab') > 1:
            # Every device scores all tokens of its row of the mesh against its own part of the vocabulary.
            return loss(*operands, alone=False)
        # Every device scores its own tokens: d embedding is summed over devices once, and not for every slice.
        by_token = ('batch', 'length')
        return sum_over_mesh(loss, *operands, axes=[(*by_token, None), (None, None), by_token, by_token])

    @property
    def _output(self) -> Embedding:
        return self.output if self.config.output_layer == 'own' else self.embedding

    def _stack(self, tokens_BN: Array, tokens: TokenInfo, deterministic: bool) -> Array:
        """Embedding, blocks and last norm, [B, N, D].

        Padding is cleared here once: it stays finite, since to a layer it is a token that sees nothing, and no op lets
        another token see it.
        """
        config = self.config
        x_BND = self.embedded(tokens_BN)
        if config.absolute_position == 'sinusoid':
            x_BND = x_BND + self.position(tokens.positions_BN, config.model_dim)
        x_BND = clear_padding(self.dropout(x_BND, deterministic=deterministic), tokens.segment_ids_BN)
        x_BND = constrain(x_BND, 'batch', 'length', 'act_embed')
        x = x_BND
        if self.implementation.norm == 'triton' and tokens.whole:
            x = first_residual(x_BND, config.dtype)
        for block in [self.blocks] if config.layer_stack == 'scan' else self.blocks:
            x, _ = block(x, tokens, deterministic)
        if isinstance(x, Residual):
            return self.final_norm.of_residual(x)[1]
        return x if config.norm_placement == 'post' else self.final_norm(x)

    def _rope_tables(self, positions_BN: Array) -> dict[int, tuple[Array, Array]]:
        """Cosines and sines for every width that the layers rotate, computed once."""
        config = self.config
        if config.rope == 'none':
            return {}
        widths = ARCHITECTURES[config.name].family.rope_widths(config)
        return {width: rope_table(positions_BN, width, dtype=jnp.dtype(config.dtype)) for width in sorted(widths)}
