"""Classification of texts, or of pairs of texts, by bidirectional models; labels: `gau.data.labelled`."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gau.objectives.text import TextObjective


class Classification(TextObjective):
    """Which of some classes a text belongs to.

    The language model stays whole under `trunk`, so that `config.init_from` can fill it; `head` is new. Its embedding's
    second use, as output layer, has no part in this.
    """

    causal = False
    rows = 'classification'
    evaluator = 'classification'
    targets = 'examples'
    metrics = ('accuracy',)

    def resolve_data(self, config: ConfigDict) -> ConfigDict:
        """See `gau.data.labelled.resolve`."""
        from gau.data import labelled

        return labelled.resolve(config)

    def check_split(self, config: ConfigDict, split: str) -> None:
        """See `gau.data.labelled.check_split`."""
        from gau.data import labelled

        labelled.check_split(config, split)

    def places_per_epoch(self, config: ConfigDict, tokenizer: Any) -> int:
        """A row for each example, which is cut to one."""
        from gau.data import labelled

        return labelled.count(config, 'train') * config.context

    def build(self, config: ConfigDict, *, data: ConfigDict, tokenizer: Any, target: Any) -> Any:
        """Returns the language model with a head of as many classes as there are labels."""
        from gau.models.classifier import Classifier

        trunk = super().build(config, data=data, tokenizer=tokenizer, target=target)
        return Classifier(trunk, len(data.classification.labels))

    def flops_per_token(self, config: ConfigDict, *, context: int, tokenizer: Any) -> float:
        """As of the language model without its output layer; the head reads one vector for a whole row."""
        from gau.models import counts

        return counts.flops_per_token(config, context=context, vocab_size=0, causal=self.causal)

    def loss(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, dict]:
        """Returns the sum of nats of the right classes, and how many classes were right."""
        import jax.numpy as jnp

        nll_B, predicted_B = self.outputs(model, params, batch, dropout_key=dropout_key)
        labels_B, weights_B = self.answers(batch)
        return jnp.sum(nll_B * weights_B), {'accuracy': jnp.sum((predicted_B == labels_B) * weights_B)}

    def outputs(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, Any]:
        """Returns the nats of the right class, [B] float32, and the likeliest class, [B] int32."""
        import jax.numpy as jnp
        import optax

        logits_BL = model.apply(
            {'params': params},
            batch['inputs'],
            segment_ids_BN=batch['segment_ids'],
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {'dropout': dropout_key},
        )
        labels_B, _ = self.answers(batch)
        return (
            optax.softmax_cross_entropy_with_integer_labels(logits_BL, labels_B),
            jnp.argmax(logits_BL, axis=-1).astype(jnp.int32),
        )

    def answers(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Returns the numbers of the labels, [B] int32, and which rows are examples, [B] float32; either kind of array.

        A row that fills a batch up is all padding and has label 0.
        """
        counted_BN = batch['weights'] > 0
        return (batch['targets'] * counted_BN).sum(axis=1), batch['weights'].sum(axis=1)
