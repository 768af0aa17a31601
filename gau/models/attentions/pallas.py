"""What the Pallas kernels of the gated unit need, which are for TPUs."""

from typing import Any

from ml_collections import ConfigDict

from gau.models.attentions.record import Needs
from gau.models.target import Target
from gau.models.widths import expanded_dim

# What has been compiled into the vector memory of a v4, the smallest.
WIDEST_KEY = 256


def pallas(
    *,
    longest_window: int | None = None,
    widest: int | None = None,
    **wanted: Any,
) -> Needs:
    """Returns the needs of kernels that have been compiled for some values of fields.

    Args:
      longest_window: most tokens of the chunks that a local branch reads, or None.
      widest: largest E, or None.
      **wanted: values of fields, a tuple or one for each.
    """
    wanted = {'num_heads': 1, 'dtype': ('bfloat16', 'float32'), **wanted}

    def lacks(config: ConfigDict, target: Target) -> str | None:
        if target.platform != 'tpu' and not (target.platform == 'cpu' and target.pallas_interpreted):
            return f'a TPU, this is {target.platform}'
        for field, values in wanted.items():
            values = values if isinstance(values, tuple) else (values,)
            if config[field] not in values:
                return f'{field}={" or ".join(map(str, values))}, this is {config[field]}'
        if config.query_key_dim > WIDEST_KEY:
            return f'query_key_dim up to {WIDEST_KEY}, this is {config.query_key_dim}'
        if longest_window is not None and config.chunk_size * (config.local_window or 1) > longest_window:
            tokens = f'chunk_size * local_window up to {longest_window}'
            return f'{tokens}, this is {config.chunk_size * (config.local_window or 1)}'
        width = 'E = expansion_factor * model_dim'
        # An interpreter has no lanes.
        if target.platform == 'tpu' and expanded_dim(config) % 128:
            return f'{width} a multiple of 128, this is {expanded_dim(config)}'
        if widest is not None and expanded_dim(config) > widest:
            return f'{width} up to {widest}, this is {expanded_dim(config)}'
        return None

    # Exact float32 products take a TPU several passes, where the compiler's own take one.
    return Needs(lacks, worth=lambda config, target: target.platform == 'tpu' and config.dtype == 'bfloat16')
