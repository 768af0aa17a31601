"""What the Pallas kernels of the gated unit need, which are for TPUs."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gau.models.attentions.record import Needs
from gau.models.target import Target
from gau.models.widths import expanded_dim

# What has been compiled into the vector memory of a v4, the smallest.
WIDEST_KEY = 256


def pallas(
    *,
    at_most: Mapping[str, int] | None = None,
    widest: int | None = None,
    sharded: Mapping[str, Any] | None = None,
    **wanted: Any,
) -> Needs:
    """Returns the needs of kernels that have been compiled for some values of fields.

    Args:
      at_most: largest values of fields.
      widest: largest E, or None.
      sharded: what more is wanted where devices share a sequence.
      **wanted: values of fields, a tuple or one for each.
    """
    wanted = {'num_heads': 1, 'dtype': ('bfloat16', 'float32'), **wanted}
    at_most = {'query_key_dim': WIDEST_KEY, **(at_most or {})}

    def lacks(config: ConfigDict, target: Target) -> str | None:
        if target.platform != 'tpu' and not (target.platform == 'cpu' and target.pallas_interpreted):
            return f'a TPU, this is {target.platform}'
        shared = (sharded or {}) if target.sequence_shards > 1 else {}
        for where, fields in (('', wanted), (' where devices share a sequence', shared)):
            for field, values in fields.items():
                values = values if isinstance(values, tuple) else (values,)
                if config[field] not in values:
                    return f'{field}={" or ".join(map(str, values))}{where}, this is {config[field]}'
        for field, most in at_most.items():
            if config[field] > most:
                return f'{field} up to {most}, this is {config[field]}'
        width = 'E = expansion_factor * model_dim'
        # An interpreter has no lanes.
        if target.platform == 'tpu' and expanded_dim(config) % 128:
            return f'{width} a multiple of 128, this is {expanded_dim(config)}'
        if widest is not None and expanded_dim(config) > widest:
            return f'{width} up to {widest}, this is {expanded_dim(config)}'
        return None

    # Exact float32 products take a TPU several passes, where the compiler's own take one.
    return Needs(lacks, worth=lambda config, target: target.platform == 'tpu' and config.dtype == 'bfloat16')
