"""What the Pallas kernels of FLASH need, which are for TPUs."""

from ml_collections import ConfigDict

from gau.models.attentions.record import Needs
from gau.models.target import Target
from gau.models.widths import expanded_dim

WANTED = {
    'num_heads': (1,),
    'gate': ('silu',),
    'branches': ('both',),
    'dtype': ('bfloat16', 'float32'),
}
# What has been compiled into the vector memory of a v4, the smallest.
LONGEST_CHUNK = 512
WIDEST_KEY = 256


def _lacks(config: ConfigDict, target: Target) -> str | None:
    if target.platform != 'tpu' and not (target.platform == 'cpu' and target.pallas_interpreted):
        return f'a TPU, this is {target.platform}'
    for field, values in WANTED.items():
        if config[field] not in values:
            return f'{field}={" or ".join(map(str, values))}, this is {config[field]}'
    for field, most in {'chunk_size': LONGEST_CHUNK, 'query_key_dim': WIDEST_KEY}.items():
        if config[field] > most:
            return f'{field} up to {most}, this is {config[field]}'
    # An interpreter has no lanes.
    if target.platform == 'tpu' and expanded_dim(config) % 128:
        return f'E = expansion_factor * model_dim a multiple of 128, this is {expanded_dim(config)}'
    return None


# Exact float32 products take a TPU several passes, where the compiler's own take one.
PALLAS = Needs(_lacks, worth=lambda config, target: target.platform == 'tpu' and config.dtype == 'bfloat16')
