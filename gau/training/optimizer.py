"""The optimizers, with the schedule, the clipping, and the rules of weight decay and learning rate of the config."""

import collections
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.training.mesh import path_name

# Layers stacked by a scan live under this name, the layer as leading axis of every leaf; others under blocks_0, ...
STACKED = 'blocks'
LAYERS = re.compile(rf'{STACKED}(_\d+)?')
# The root mean square of AdamW's steps, in units of the learning rate (Liu et al. 2025, arXiv 2502.16982).
MUON_RMS = 0.2


def make_schedule(
    config: ConfigDict, *, warmup_steps: int, total_steps: int, last_decay_steps: int = 0
) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then the named decay until `total_steps`.

    Args:
      config: the config's `optimizer` section, resolved.
      warmup_steps: of the warm-up.
      total_steps: of the run.
      last_decay_steps: for the schedule `wsd`, how many steps at the end decay linearly.

    Raises:
      UserError: the warm-up, or warm-up and decay of `wsd`, are longer than the run.
    """
    if warmup_steps > total_steps:
        raise UserError(
            f'the warm-up of {warmup_steps} steps is longer than the run of {total_steps}: '
            f'optimizer.warmup_steps is to be {total_steps} at most'
        )
    if warmup_steps + last_decay_steps > total_steps:
        raise UserError(
            f'the warm-up of {warmup_steps} steps and the decay of {last_decay_steps} are longer than the run of '
            f'{total_steps}'
        )
    peak, end = config.learning_rate, config.learning_rate * (config.final_fraction or 0.0)
    decay_steps = max(total_steps - warmup_steps, 1)
    decay = {
        'linear': lambda: optax.linear_schedule(peak, end, decay_steps),
        'cosine': lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction or 0.0),
        'constant': lambda: optax.constant_schedule(peak),
        'wsd': lambda: optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, max(last_decay_steps, 1))],
            [decay_steps - last_decay_steps],
        ),
    }[config.schedule]()
    if warmup_steps == 0:
        return decay
    # Step 0 already moves: with `(step + 1) / warmup` the first batch is not thrown away.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1) if warmup_steps > 1 else decay
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, params: Any, *, dtype: str = 'float32'
) -> optax.GradientTransformation:
    """Clip, the named optimizer's direction, decoupled weight decay, learning rate.

    `adamw`; `lion`, which wants a third to a tenth of its learning rate and more decay; `muon` for the matrices of the
    layers, each step as large as AdamW's would be, and AdamW for the rest: embedding, norms, biases; `adafactor`, whose
    second moments of matrices are two vectors, and whose steps are relative to the size of a parameter, so that it
    wants about ten times the learning rate.

    Args:
      config: the config's `optimizer` section, resolved.
      schedule: learning rate by step.
      params: the (abstract, unboxed) parameters, for their paths.
      dtype: of muon's matmuls, the model's; its momentum has the parameters'.

    Raises:
      UserError: a rule of weight decay, learning rate or freezing that decides for no parameter, or all are frozen.
    """
    clip = {
        'local': lambda: clip_by_parameter_norm(config.clip_norm),
        'global': lambda: optax.clip_by_global_norm(config.clip_norm),
        'none': optax.identity,
    }[config.clip]()
    direction = {
        'adamw': lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        'lion': lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
        'muon': lambda: _scale_by_muon_or_adam(config, dtype),
        'adafactor': _scale_by_adafactor,
    }[config.name]()
    decay = rule_factors('weight_decay_rules', config.weight_decay_rules, params, otherwise=0.0)
    if config.frozen:
        frozen = frozen_parameters(config, params)
        decay = jax.tree.map(lambda factor, is_frozen: 0.0 if is_frozen else factor, decay, frozen)
        # They have no moments.
        labels = jax.tree.map(lambda is_frozen: 'frozen' if is_frozen else 'trained', frozen)
        direction = optax.partition({'trained': direction, 'frozen': optax.set_to_zero()}, labels)
    parts = [clip, direction, _add_decayed_weights(config.weight_decay, decay)]
    if config.learning_rate_rules:
        rates = rule_factors('learning_rate_rules', config.learning_rate_rules, params, otherwise=1.0)
        parts.append(_scale_by_factors(rates))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.keep_zeros:
        rules = tuple((pattern, 1.0) for pattern in config.keep_zeros)
        parts.append(_keep_zeros(rule_factors('keep_zeros', rules, params, otherwise=0.0)))
    return optax.chain(*parts)


def frozen_parameters(config: ConfigDict, params: Any) -> Any:
    """Returns a tree like `params` of bools: whether one of the config's `optimizer.frozen` is found in the path.

    Raises:
      UserError: a bad regex, or one that freezes nothing; or all parameters are frozen.
    """
    rules = tuple((pattern, 1.0) for pattern in config.frozen)
    frozen = jax.tree.map(bool, rule_factors('frozen', rules, params, otherwise=0.0))
    if all(jax.tree.leaves(frozen)):
        raise UserError(f'optimizer.frozen={tuple(config.frozen)} freezes every parameter: nothing is left to train')
    return frozen


def rule_factors(field: str, rules: Any, params: Any, *, otherwise: float) -> Any:
    """Returns a tree like `params` of floats: the factor of the first rule whose regex is found in the path.

    Args:
      field: of the config's `optimizer` section, for error messages.
      rules: (regex, factor) pairs.
      params: for their paths.
      otherwise: where no regex is found.

    Raises:
      UserError: a bad regex, or a rule that decides for no parameter.
    """
    try:
        compiled = [(re.compile(pattern), float(factor)) for pattern, factor in rules]
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f'optimizer.{field}={rules}: want ((regex, factor), ...), {error}') from error
    for pattern, factor in compiled:
        if not 0 <= factor < math.inf:
            raise UserError(f'optimizer.{field}: the factor {factor:g} of "{pattern.pattern}" is none from 0 on')
    used = [False] * len(compiled)

    def factor_of(path: Any, _: Any) -> float:
        for index, (pattern, factor) in enumerate(compiled):
            if pattern.search(path_name(path)):
                used[index] = True
                return factor
        return otherwise

    factors = jax.tree_util.tree_map_with_path(factor_of, params)
    for (pattern, _), was_used in zip(compiled, used, strict=True):
        if not was_used:
            raise UserError(f'optimizer.{field}: "{pattern.pattern}" decides for no parameter')
    return factors


def _scale_by_muon_or_adam(config: ConfigDict, dtype: str) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        def label(path: Any, leaf: Any) -> str:
            return 'adam' if matrix_axes(path_name(path), nn.unbox(leaf)) is None else 'muon'

        # A boxed parameter is one leaf, under the same path as without its box.
        is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)  # noqa: E731
        return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_box)

    # Without an iteration it is momentum, of norm 1.
    momentum = optax.contrib.scale_by_muon(ns_steps=0, weight_dimension_numbers=_muon_axes)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.partition({'muon': optax.chain(momentum, _orthogonalize(dtype)), 'adam': adam}, labels)


def _orthogonalize(dtype: str) -> optax.GradientTransformation:
    """Muon's steps of singular values near 1, scaled to the root mean square of AdamW's (Liu et al. 2025).

    Kernels of one shape are one batch of matrices, whatever layer they are of: the fifteen matmuls of a single matrix
    are too small to fill an accelerator.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        leaves = [leaf for _, leaf in paths_and_leaves]
        alike = collections.defaultdict(list)
        for index, (path, leaf) in enumerate(paths_and_leaves):
            alike[leaf.shape, matrix_axes(path_name(path), leaf)].append(index)
        steps = list(leaves)
        for (shape, sides), indices in alike.items():
            inputs, outputs = (tuple(axis + 1 for axis in side) for side in sides)
            axes = optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)
            # Without momentum it is Newton and Schulz' iteration.
            muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
            batch = jnp.stack([leaves[index].astype(dtype) for index in indices])
            batch, _ = muon.update(batch, muon.init(batch))
            scale = MUON_RMS * math.sqrt(max(math.prod(shape[axis] for axis in side) for side in sides))
            for index, step in zip(indices, batch, strict=True):
                steps[index] = step.astype(leaves[index].dtype) * scale
        return jax.tree.unflatten(tree, steps), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _muon_axes(updates: Any) -> Any:
    def axes(path: Any, leaf: Any) -> Any:
        inputs, outputs = matrix_axes(path_name(path), leaf)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    return jax.tree_util.tree_map_with_path(axes, updates)


def matrix_axes(name: str, leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the axes of inputs and of outputs if the parameter is a layer's matrix, or several; None if it is not.

    Embedding and heads are none. The kernels of a layer are `out` [..., D], from one or more axes, and others: [D, E],
    [D, parts, E] or [D, parts, H, K], of which each part is a matrix of its own. Layers stacked by a scan come first.
    """
    *parents, name = name.split('/')
    if name != 'kernel' or not any(map(LAYERS.fullmatch, parents)):
        return None
    first = int(STACKED in parents)
    axes = tuple(range(first, leaf.ndim))
    if parents[-1] == 'out':
        return axes[:-1], axes[-1:]
    return axes[:1], axes[1:] if len(axes) == 2 else axes[2:]


def _scale_by_adafactor() -> optax.GradientTransformation:
    parts = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    # A factor has other axes than its parameter: it is whole on every device.
    return optax.GradientTransformation(lambda params: parts.init(nn.unbox(params)), parts.update)


def _scale_by_factors(factors: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _keep_zeros(chosen: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def kept(update: jax.Array, param: jax.Array, factor: float) -> jax.Array:
            return jnp.where(param == 0, 0, update) if factor else update

        return jax.tree.map(kept, updates, params, chosen), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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
            stacked = STACKED in path_name(path).split('/')
            axes = tuple(range(1, update.ndim)) if stacked else None
            norm = jnp.sqrt(jnp.sum(jnp.square(update.astype(jnp.float32)), axis=axes, keepdims=stacked))
            return update * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-20)).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(clipped, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
