"""The state of a run and the jitted functions over it: create, train step, evaluation step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    step: int32 scalar, steps done. params: float32 tree. opt_state: optax's tree. None of it holds a random key: the
    dropout key of a step is a function of the seed and the step, so that a resumed run draws what the first one drew.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def init_params(model: nn.Module, *, seed: int, context: int) -> Any:
    """Returns freshly drawn parameters, boxed with their logical axis names."""
    tokens_BN = jnp.zeros((1, context), jnp.int32)
    return model.init(jax.random.key(seed), tokens_BN)['params']


def make_init(draw_params: Callable[[], Any], optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Returns a function that draws the boxed state of step 0; wrap it in `jax.eval_shape` or `jax.jit`.

    Args:
      draw_params: returns what `init_params` does.
      optimizer: whose state is made for it.
    """

    def init() -> TrainState:
        params = draw_params()
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return init


def token_losses(model: nn.Module, params: Any, batch: Batch) -> jax.Array:
    """Returns nll_BN float32, nats per target, without dropout."""
    return model.apply(
        {'params': params},
        batch['inputs'],
        batch['targets'],
        segment_ids_BN=batch.get('segment_ids'),
        positions_BN=batch.get('positions'),
        method='token_losses',
    )


def weighted_loss(model: nn.Module, params: Any, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
    """Returns the sum of the batch's weights times nats per target, float32; dropout is off without a key."""
    return model.apply(
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


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    accumulation_steps: int,
    dropout: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns (state, batch) -> (state, metrics), pure, to be jitted with the state donated.

    The loss is the mean over the weighted targets of the whole batch, whatever the number of micro-batches. Metrics:
    loss, grad_norm (before clipping), learning_rate, tokens (sum of the weights), parameter_grad_norms (a vector in
    the order of the tree's leaves, there to name the culprit when a loss is not finite).
    """

    def summed_loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weighted_loss(model, params, batch, dropout_key=key if dropout else None), jnp.sum(batch['weights'])

    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)

    def accumulate(params: Any, batch: Batch, key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        if accumulation_steps == 1:
            return value_and_grad(params, batch, key)

        # Every k-th row goes into one micro-batch: each device then keeps the rows that it already holds.
        def micro(x_BN: jax.Array) -> jax.Array:
            rows = x_BN.shape[0] // accumulation_steps
            return x_BN.reshape(rows, accumulation_steps, *x_BN.shape[1:]).swapaxes(0, 1)

        def body(total: Any, micro_batch_and_key: Any) -> tuple[Any, None]:
            micro_batch, micro_key = micro_batch_and_key
            return jax.tree.map(jnp.add, total, value_and_grad(params, micro_batch, micro_key)), None

        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        keys = jax.random.split(key, accumulation_steps)
        return jax.lax.scan(body, zero, (jax.tree.map(micro, batch), keys))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss_sum, tokens), grads = accumulate(state.params, batch, key)
        # A batch may hold no target at all (MLM draws its masks): its gradient is zero, not NaN.
        scale = 1.0 / jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        norms = jnp.stack([jnp.sqrt(jnp.sum(jnp.square(grad))) for grad in jax.tree.leaves(grads)])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            'loss': loss_sum * scale,
            'tokens': tokens,
            'grad_norm': jnp.sqrt(jnp.sum(jnp.square(norms))),
            'learning_rate': schedule(state.step),
            'parameter_grad_norms': norms,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(model: nn.Module) -> Callable[[Any, Batch], jax.Array]:
    """Returns (params, batch) -> nll_BN float32, without dropout."""
    return lambda params, batch: token_losses(model, params, batch)
