"""What the objectives on documents have in common: batches by `gau.data`, a language model, a loss for each token."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from ml_collections import ConfigDict

from gau.data.passes import Passes
from gau.objectives.objective import Batch, Objective, TrainBatches


class TextObjective(Objective):
    """Predicts tokens of documents.

    Attributes:
      rows: how documents become rows: a name of `gau.data.formats`, or a RowFormat.
    """

    rows: ClassVar[Any]
    evaluator = 'perplexity_by_position'

    def resolve_data(self, config: ConfigDict) -> ConfigDict:
        """See `gau.data.config.resolve`."""
        from gau.data import config as data_config

        return data_config.resolve(config, objective=self.rows)

    def tokenizer(self, config: ConfigDict) -> Any:
        """Returns the one that the config names."""
        from gau.data import tokenizers

        return tokenizers.load(config.tokenizer)

    def identity(self, config: ConfigDict) -> dict[str, str]:
        """See `gau.data.sources.identity`."""
        from gau.data import sources

        return sources.identity(config)

    def check_split(self, config: ConfigDict, split: str) -> None:
        """See `gau.data.sources.open_split`."""
        from gau.data import sources

        sources.open_split(config, split)

    def places_per_epoch(self, config: ConfigDict, tokenizer: Any) -> int:
        """See `gau.data.counting.places_per_epoch`."""
        from gau.data import pipeline

        return pipeline.places_per_epoch(config, tokenizer, self.rows)

    def passes(self, config: ConfigDict, places: int) -> dict[str, Passes]:
        """See `gau.data.passes`."""
        from gau.data import formats, passes

        return passes.passes(config, places, frame=formats.get(self.rows).frame)

    def train_batches(
        self, config: ConfigDict, *, tokenizer: Any, seed: int, rows: Sequence[int] | None = None
    ) -> TrainBatches:
        """See `gau.data.pipeline.train_iterator`."""
        from gau.data import pipeline

        return pipeline.train_iterator(config, objective=self.rows, tokenizer=tokenizer, seed=seed, rows=rows)

    def eval_batches(
        self, config: ConfigDict, *, tokenizer: Any, split: str, context: int, batch_size: int, max_tokens: int | None
    ) -> Iterator[Batch]:
        """See `gau.data.pipeline.eval_iterator`."""
        from gau.data import pipeline

        return pipeline.eval_iterator(
            config,
            split=split,
            context=context,
            batch_size=batch_size,
            objective=self.rows,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
        )

    def arrays(self, config: ConfigDict, *, rows: int, context: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Inputs, targets and weights [B, N]; where rows hold several documents or padding, these as well."""
        dtypes = {'inputs': np.int32, 'targets': np.int32, 'weights': np.float32}
        if config.packing != 'concat' or not config.attend_across_documents:
            dtypes |= {'segment_ids': np.int32, 'positions': np.int32}
        return {name: ((rows, context), dtype) for name, dtype in dtypes.items()}

    def build(self, config: ConfigDict, *, data: ConfigDict, tokenizer: Any, target: Any) -> Any:
        """Returns a language model."""
        from gau.models import registry

        return registry.build(config, vocab_size=tokenizer.vocab_size, causal=self.causal, target=target)

    def init(self, model: Any, key: Any, *, context: int) -> Any:
        """Draws the parameters by reading one row of zeros."""
        import jax.numpy as jnp

        tokens_BN = jnp.zeros((1, context), jnp.int32)
        return model.init(key, tokens_BN)['params']

    def flops_per_token(self, config: ConfigDict, *, context: int, tokenizer: Any) -> float:
        """See `gau.models.counts`."""
        from gau.models import counts

        return counts.flops_per_token(config, context=context, vocab_size=tokenizer.vocab_size, causal=self.causal)

    def loss(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, dict]:
        """Returns the sum of the weights times nats per target."""
        summed = model.apply(
            {'params': params},
            batch['inputs'],
            batch['targets'],
            batch['weights'],
            segment_ids_BN=batch.get('segment_ids'),
            positions_BN=batch.get('positions'),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {'dropout': dropout_key},
            method='weighted_loss',
        )
        return summed, {}

    def token_losses(self, model: Any, params: Any, batch: Mapping[str, Any]) -> Any:
        """Returns nll_BN float32, nats for every target, without dropout; what perplexity is made of."""
        return model.apply(
            {'params': params},
            batch['inputs'],
            batch['targets'],
            segment_ids_BN=batch.get('segment_ids'),
            positions_BN=batch.get('positions'),
            method='token_losses',
        )
