"""The two layouts of a model's parameters: layers side by side (`blocks_0`, `blocks_1`, ...) or stacked (`blocks`)."""

import re
from typing import Any

import jax
import jax.numpy as jnp

PREFIX = 'blocks'


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a model with layer_stack=unrolled as layer_stack=scan wants them.

    Args:
      params: plain arrays (`flax.linen.unbox` takes the axis names off) under `blocks_0`, `blocks_1`, ...

    Returns:
      The same under `blocks`, every leaf with a leading axis of layers; the rest unchanged.

    Raises:
      ValueError: there is no `blocks_0`, or the layers are not alike.
    """
    layers = sorted((name for name in params if re.fullmatch(rf'{PREFIX}_\d+', name)), key=lambda x: int(x[7:]))
    if not layers:
        raise ValueError(f'no {PREFIX}_0 among {sorted(params)}: not the parameters of an unrolled model')
    rest = {name: value for name, value in params.items() if name not in layers}
    return rest | {PREFIX: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in layers))}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a model with layer_stack=scan as layer_stack=unrolled wants them.

    Raises:
      ValueError: there is no `blocks`.
    """
    if PREFIX not in params:
        raise ValueError(f'no {PREFIX} among {sorted(params)}: not the parameters of a scanned model')
    rest = {name: value for name, value in params.items() if name != PREFIX}
    count = jax.tree.leaves(params[PREFIX])[0].shape[0]
    layers = {f'{PREFIX}_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], params[PREFIX]) for i in range(count)}
    return rest | layers
