"""AdamW with the schedule, clipping and weight decay rules of the config."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.training.mesh import path_name

# Layers stacked by a scan live under this name, with the layer as leading axis of every leaf.
STACKED = 'blocks'


def make_schedule(config: ConfigDict, *, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then the named decay until `total_steps`.

    Raises:
      UserError: the warm-up is longer than the run.
    """
    if warmup_steps > total_steps:
        raise UserError(f'the warm-up of {warmup_steps} steps is longer than the run of {total_steps}')
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(total_steps - warmup_steps, 1)
    decay = {
        'linear': lambda: optax.linear_schedule(peak, end, decay_steps),
        'cosine': lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction),
        'constant': lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if warmup_steps == 0:
        return decay
    # Step 0 already moves: with `(step + 1) / warmup` the first batch is not thrown away.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1) if warmup_steps > 1 else decay
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay, learning rate.

    Args:
      config: the config's `optimizer` section.
      schedule: learning rate by step.
      params: the (abstract, unboxed) parameters, for their paths.

    Raises:
      UserError: a weight decay rule that decides for no parameter.
    """
    clip = {
        'local': lambda: clip_by_parameter_norm(config.clip_norm),
        'global': lambda: optax.clip_by_global_norm(config.clip_norm),
        'none': optax.identity,
    }[config.clip]()
    factors = decay_factors(config.weight_decay_rules, params)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        _add_decayed_weights(config.weight_decay, factors),
        optax.scale_by_learning_rate(schedule),
    )


def decay_factors(rules: Any, params: Any) -> Any:
    """Returns a tree like `params` of floats: the factor of the first rule whose regex is found in the path, else 0.

    Raises:
      UserError: a bad regex, or a rule that decides for no parameter.
    """
    try:
        compiled = [(re.compile(pattern), float(factor)) for pattern, factor in rules]
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f'optimizer.weight_decay_rules={rules}: want ((regex, factor), ...), {error}') from error
    used = [False] * len(compiled)

    def factor_of(path: Any, _: Any) -> float:
        for index, (pattern, factor) in enumerate(compiled):
            if pattern.search(path_name(path)):
                used[index] = True
                return factor
        return 0.0

    factors = jax.tree_util.tree_map_with_path(factor_of, params)
    for (pattern, _), was_used in zip(compiled, used, strict=True):
        if not was_used:
            raise UserError(f'optimizer.weight_decay_rules: "{pattern.pattern}" decides for no parameter')
    return factors


def _add_decayed_weights(weight_decay: float, factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def decayed(update: jax.Array, param: jax.Array, factor: float) -> jax.Array:
            return update + weight_decay * factor * param if factor else update

        return jax.tree.map(decayed, updates, params, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_parameter_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales each parameter's gradient down to `max_norm` by its own L2 norm ("local" clipping).

    Layers stacked by a scan are clipped one by one, so that a scanned and an unrolled model train alike.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def clipped(path: Any, update: jax.Array) -> jax.Array:
            stacked = path_name(path).split('/')[0] == STACKED
            axes = tuple(range(1, update.ndim)) if stacked else None
            norm = jnp.sqrt(jnp.sum(jnp.square(update.astype(jnp.float32)), axis=axes, keepdims=stacked))
            return update * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-20)).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(clipped, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
