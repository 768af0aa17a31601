"""The state of a run and the functions over it, to be jitted: create, train step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from gau.objectives.objective import Objective

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    step: int32 scalar, steps done. params: float32 tree. opt_state: optax's tree. None of it holds a random key: the
    dropout key of a step is a function of the seed and the step, so that a resumed run draws what the first one drew.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def make_init(
    draw_params: Callable[[jax.Array | int], Any], optimizer: optax.GradientTransformation
) -> Callable[[jax.Array | int], TrainState]:
    """Returns a function of the seed that draws the boxed state of step 0; wrap it in `jax.eval_shape` or `jax.jit`.

    Args:
      draw_params: returns freshly drawn parameters, boxed with their logical axis names.
      optimizer: whose state is made for it.
    """

    def init(seed: jax.Array | int) -> TrainState:
        params = draw_params(seed)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return init


def make_train_step(
    objective: Objective,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulation_steps: int,
    dropout: bool,
    update_shardings: Any = None,
    frozen: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns (state, batch) -> (state, metrics), pure, to be jitted with the state donated.

    The loss is the mean over the weighted targets of the whole batch, whatever the number of micro-batches. Metrics:
    loss, grad_norm (before clipping), learning_rate, the sum of the weights (by the objective's `targets`), the
    means of the objective's `metrics`, parameter_grad_norms (a vector in the order of the tree's leaves, there to name
    the culprit when a loss is not finite).

    Args:
      objective: gives the loss.
      model: the objective's.
      optimizer: what makes steps of gradients.
      schedule: the learning rate that is logged.
      seed: of dropout.
      accumulation_steps: micro-batches.
      dropout: whether there is any.
      frozen: tree of bools, which parameters have no gradient; None: all have one.
      update_shardings: a tree like the parameters of the shardings with which they are updated, where these are not
        their own; None: they are.
    """

    def summed_loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        if frozen is not None:
            params = jax.tree.map(lambda x, still: jax.lax.stop_gradient(x) if still else x, params, frozen)
        loss_sum, sums = objective.loss(model, params, batch, dropout_key=key if dropout else None)
        return loss_sum, {objective.targets: jnp.sum(batch['weights']), **sums}

    gradient = jax.value_and_grad(summed_loss, has_aux=True)
    if accumulation_steps > 1:
        sums_of = objective.targets, *objective.metrics
        gradient = functools.partial(_accumulated, gradient, steps=accumulation_steps, sums_of=sums_of)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss_sum, sums), grads = gradient(state.params, batch, key)
        # A batch may hold no target at all (MLM draws its masks): its gradient is zero, not NaN.
        targets = sums.pop(objective.targets)
        scale = 1.0 / jnp.maximum(targets, 1.0)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        params = state.params
        if update_shardings is not None:
            grads, params = (jax.lax.with_sharding_constraint(tree, update_shardings) for tree in (grads, params))
        norms = jnp.stack([jnp.sqrt(jnp.sum(jnp.square(grad))) for grad in jax.tree.leaves(grads)])
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        metrics = {
            'loss': loss_sum * scale,
            objective.targets: targets,
            'grad_norm': jnp.sqrt(jnp.sum(jnp.square(norms))),
            'learning_rate': schedule(state.step),
            'parameter_grad_norms': norms,
            **{name: x * scale for name, x in sums.items()},
        }
        params = optax.apply_updates(params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _accumulated(
    gradient: Callable[..., Any], params: Any, batch: Batch, key: jax.Array, *, steps: int, sums_of: Sequence[str]
) -> tuple[tuple[jax.Array, Sums], Any]:
    """Returns ((loss, sums), gradients) of a batch, added up over micro-batches, each with a key of its own.

    Args:
      gradient: of (params, batch, key), as `jax.value_and_grad` makes it of a summed loss.
      params: parameters.
      batch: arrays whose rows `steps` divides.
      key: of dropout.
      steps: micro-batches.
      sums_of: the names of the sums.
    """

    # Every k-th row goes into one micro-batch: each device then keeps the rows that it already holds.
    def micro(x_BN: jax.Array) -> jax.Array:
        rows = x_BN.shape[0] // steps
        return x_BN.reshape(rows, steps, *x_BN.shape[1:]).swapaxes(0, 1)

    def body(total: Any, micro_batch_and_key: Any) -> tuple[Any, None]:
        micro_batch, micro_key = micro_batch_and_key
        return jax.tree.map(jnp.add, total, gradient(params, micro_batch, micro_key)), None

    zero = ((jnp.zeros(()), {name: jnp.zeros(()) for name in sums_of}), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(body, zero, (jax.tree.map(micro, batch), jax.random.split(key, steps)))[0]
