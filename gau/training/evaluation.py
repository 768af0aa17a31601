"""The one evaluator, used inside training and by eval.py: loss, perplexity, bits per byte, loss by position."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gau.data import pipeline
from gau.training import mesh as meshes
from gau.training.batches import put_batch

LN2 = math.log(2.0)
# Keys of an evaluation batch that the model has no use for.
HOST_ONLY = ('target_bytes', 'target_words')


@dataclasses.dataclass(frozen=True)
class Result:
    """Sums over one data split, and what is read off them.

    loss_sum: nats over all targets; tokens, bytes, words: how many targets, and bytes and words of text they spell;
    position_loss, position_tokens: [context] the same by the number of tokens that a target can look back on.
    """

    split: str
    context: int
    loss_sum: float
    tokens: float
    bytes: float
    words: float
    position_loss: np.ndarray
    position_tokens: np.ndarray

    def metrics(self) -> dict[str, Any]:
        """Returns the fields of the contract; ratios without a denominator are null."""
        loss = self.loss_sum / self.tokens if self.tokens else None
        return {
            'loss': loss,
            'perplexity': _exp(loss),
            'bits_per_byte': self.loss_sum / LN2 / self.bytes if self.bytes else None,
            'perplexity_per_word': _exp(self.loss_sum / self.words) if self.words else None,
            'tokens': round(self.tokens),
            'bytes': round(self.bytes),
            'context': self.context,
        }

    def by_position(self) -> list[tuple[int, int, float, int]]:
        """Returns rows (first, last, mean loss, tokens) over positions in ranges that double: 0, 1, 2-3, 4-7, ..."""
        rows = []
        first = 0
        while first < self.context:
            last = min(max(2 * first, 1), self.context)
            tokens = self.position_tokens[first:last].sum()
            if tokens:
                rows.append((first, last - 1, float(self.position_loss[first:last].sum() / tokens), round(tokens)))
            first = last
        return rows


def _exp(nats: float | None) -> float | None:
    # exp of a hopeless loss overflows a double; infinity is not JSON, so it reads as null.
    return math.exp(nats) if nats is not None and nats < 700 else None


class Evaluator:
    """Evaluates parameters on a split at a context, with the config's data and one jitted step per shape."""

    def __init__(self, config: ConfigDict, eval_step: Callable[[Any, Any], jax.Array], tokenizer: Any, mesh: Mesh):
        """Takes the resolved config of the run and `step.make_eval_step`'s function."""
        self._config = config
        self._tokenizer = tokenizer
        self._sharding = meshes.batch_sharding(mesh)
        self._mesh = mesh
        # Every process gets the losses of all rows, and takes the same sums in the same order, however many there are.
        self._eval_step = jax.jit(eval_step, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(
        self,
        params: Any,
        *,
        split: str,
        context: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result | None:
        """Runs over the split once and returns its sums.

        Args:
          params: the model's parameters, unboxed.
          split: a split of the config's data.
          context: tokens a row; None means the config's. Rows are then fewer or more, so that a batch's tokens stay.
          cancelled: asked before every batch, in every process; once it says True, the result is None.

        Raises:
          UserError: unknown split, or a batch that does not divide over the mesh.
        """
        data, evaluation = self._config.data, self._config.eval
        # As many rows as a training step holds at once.
        base_rows = evaluation.batch_size or data.batch_size // self._config.optimizer.accumulation_steps
        context = context or data.context
        divisor = self._mesh.shape['data'] * self._mesh.shape['fsdp']
        rows = max(base_rows * data.context // context // divisor, 1) * divisor
        meshes.check_batch(self._mesh, batch_size=rows, context=context, model=self._config.model)
        iterator = pipeline.eval_iterator(
            data,
            split=split,
            context=context,
            batch_size=rows,
            objective=self._config.objective,
            tokenizer=self._tokenizer,
            max_tokens=evaluation.max_tokens,
        )
        sums = np.zeros(4)
        by_position = np.zeros((2, context))
        in_flight = None
        for batch in iterator:
            if cancelled():
                return None
            dispatched = self._eval_step(params, self._to_device(batch))
            # The sums of one batch are taken on the host while the device works on the next.
            if in_flight is not None:
                _add(sums, by_position, *in_flight)
            in_flight = (batch, dispatched)
        if in_flight is not None:
            _add(sums, by_position, *in_flight)
        return Result(split, context, *sums.tolist(), *by_position)

    def _to_device(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return put_batch({key: x for key, x in batch.items() if key not in HOST_ONLY}, self._sharding)


def _add(sums: np.ndarray, by_position: np.ndarray, batch: dict[str, np.ndarray], nll_BN: jax.Array) -> None:
    nll = np.asarray(nll_BN, np.float64)
    weights = batch['weights'].astype(np.float64)
    losses = nll * weights
    # Masked targets spell no text of their own: such batches bring no sizes, and the ratios read as null.
    bytes_, words = (
        np.sum(batch[key], where=weights > 0, dtype=np.float64) if key in batch else 0 for key in HOST_ONLY
    )
    sums += (losses.sum(), weights.sum(), bytes_, words)
    context = nll.shape[1]
    positions = batch.get('positions', np.broadcast_to(np.arange(context), nll.shape)).ravel()
    by_position[0] += np.bincount(positions, losses.ravel(), minlength=context)[:context]
    by_position[1] += np.bincount(positions, weights.ravel(), minlength=context)[:context]
