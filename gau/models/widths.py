"""Widths that follow from several fields of a resolved config, and what they must divide."""

from ml_collections import ConfigDict

from gau.errors import UserError


def expanded_dim(config: ConfigDict) -> int:
    """Returns E of a GAU model."""
    return round(config.expansion_factor * config.model_dim)


def check_heads(config: ConfigDict, what: str, width: int) -> None:
    """Raises UserError unless the heads divide a width."""
    if width % config.num_heads:
        raise UserError(f'model.num_heads={config.num_heads}, which does not divide {what} = {width}')


def check_even(config: ConfigDict, field: str, value: int) -> None:
    """Raises UserError for a width of queries and keys that cannot be rotated in pairs."""
    if value % 2 and config.rope != 'none':
        raise UserError(f'model.{field}={value} is odd; RoPE rotates pairs: use an even number or rope=none')
    if value % 2 and config.relative_bias == 'rotary':
        raise UserError(f'model.{field}={value} is odd; relative_bias=rotary rotates pairs: use an even number')
