"""What the Triton kernels of the gated unit need."""

from typing import Any

from ml_collections import ConfigDict

from gau.models.attentions.record import Needs
from gau.models.target import Target


def triton(**wanted: Any) -> Needs:
    """Returns the needs of kernels that work for the given values of fields, a tuple or one for each."""
    wanted = {'num_heads': 1, 'dtype': ('bfloat16', 'float32'), **wanted}

    def lacks(config: ConfigDict, target: Target) -> str | None:
        if target.platform != 'gpu' and not (target.platform == 'cpu' and target.interpreted):
            return f'an NVIDIA GPU, this is {target.platform}'
        if target.platform == 'gpu' and (target.compute_capability or (0, 0)) < (9, 0):
            return 'an NVIDIA GPU of compute capability 9.0 or more'
        if not target.triton:
            package, purpose = ('triton', 'test') if target.interpreted else ('jax-triton', 'gpu')
            return f'{package} (pip install -r requirements-{purpose}.txt)'
        for field, values in wanted.items():
            values = values if isinstance(values, tuple) else (values,)
            if config[field] not in values:
                return f'{field}={" or ".join(map(str, values))}, this is {config[field]}'
        if target.sequence_shards > 1:
            return 'mesh.sequence=1'
        if config.query_key_dim > 256:
            return f'query_key_dim up to 256, this is {config.query_key_dim}'
        return None

    # Exact float32 products have no matrix units, and the interpreter is there for tests.
    return Needs(lacks, worth=lambda config, target: config.dtype == 'bfloat16' and not target.interpreted)
