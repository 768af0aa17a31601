"""Training in the recurrent form, segment by segment of a row: `config.optimizer.segment_tokens`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gau.models import decoding
from gau.training.wrapped import Wrapped


@dataclass(frozen=True)
class Recurrent(Wrapped):
    """The loss of a language model that reads every row a segment at a time, with its decoding state carried on.

    It is the loss of the whole row, and so is its gradient, which goes back through the state. Of every segment but one
    the state at its start is all that is kept until the backward pass, which computes the rest once more.

    Attributes:
      objective: language modelling.
      segment_tokens: tokens of a segment; they divide a row.
    """

    segment_tokens: int

    def loss(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, dict]:
        """See `Objective.loss`; there is no dropout."""
        del dropout_key
        rows, context = batch['inputs'].shape
        length_B = jnp.full(rows, self.segment_tokens, jnp.int32)

        def segments(x_BN: jax.Array) -> jax.Array:
            return x_BN.reshape(rows, context // self.segment_tokens, self.segment_tokens).swapaxes(0, 1)

        def read(state: decoding.State, segment: Sequence[jax.Array]) -> tuple[decoding.State, jax.Array]:
            inputs_BT, targets_BT, weights_BT = segment
            h_BTD, state = decoding.extend(model, params, state, inputs_BT, length_B)
            loss = model.apply({'params': params}, h_BTD, targets_BT, weights_BT, method='weighted_losses')
            return state, loss

        state = decoding.init_state(model, batch_size=rows)
        xs = [segments(batch[name]) for name in ('inputs', 'targets', 'weights')]
        # In a scan nothing is shared with what is computed once more.
        _, losses = jax.lax.scan(jax.checkpoint(read, prevent_cse=False), state, xs)
        return jnp.sum(losses), {}
