"""Widths that follow from several fields of a resolved config, and what they must divide."""

import math

from ml_collections import ConfigDict

from gau.errors import UserError


def heads_at(config: ConfigDict, layer: int) -> int:
    """Returns the heads of a layer, counted from 0: max(1, ceil(H / (1 + alpha l)))."""
    return max(1, math.ceil(config.num_heads / (1 + (config.head_decay or 0.0) * layer)))


def head_dim_at(config: ConfigDict, layer: int) -> int:
    """Returns the width of a Transformer's heads in a layer: D / h(l) where heads fall, else K."""
    return config.model_dim // heads_at(config, layer) if config.head_decay else config.head_dim


def expanded_dim(config: ConfigDict) -> int:
    """Returns E of a GAU model."""
    return round(config.expansion_factor * config.model_dim)


def check_heads(config: ConfigDict, what: str, width: int) -> None:
    """Raises UserError unless the heads of every layer divide a width."""
    for layer in range(config.num_layers if config.head_decay else 1):
        heads = heads_at(config, layer)
        if width % heads:
            where = f'layer {layer} has {heads} heads' if config.head_decay else f'model.num_heads={heads}'
            raise UserError(f'{where}, which does not divide {what} = {width}')


def check_even(config: ConfigDict, field: str, value: int) -> None:
    """Raises UserError for a width of queries and keys that cannot be rotated in pairs."""
    if value % 2 and config.rope != 'none':
        raise UserError(f'model.{field}={value} is odd; RoPE rotates pairs: use an even number or rope=none')
    if value % 2 and config.relative_bias == 'rotary':
        raise UserError(f'model.{field}={value} is odd; relative_bias=rotary rotates pairs: use an even number')
