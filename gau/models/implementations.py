"""Which implementation of the attention a model is built with: what `model.impl` chose, or the fastest that works here.

`auto` stays `auto` in a config and is settled where a model is built, so a run can go on on another chip. A new
implementation is an entry of WHY_NOT and a name in `architectures.Architecture.impls`, before the slower ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.config import head_dim_at
from gau.ops.kernels.launch import available, interpreted


class Target(NamedTuple):
    """What a model is built for.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      compute_capability: of an NVIDIA GPU, as (9, 0); None for anything else.
      sequence_shards: devices that share the tokens of one sequence.
    """

    platform: str
    compute_capability: tuple[int, int] | None = None
    sequence_shards: int = 1

    @classmethod
    def of_device(cls, device: Any, *, sequence_shards: int = 1) -> 'Target':
        """Returns the target that a `jax.Device` is, one of a topology that is only compiled for included."""
        # An AMD GPU's is a name such as gfx942.
        major, _, minor = str(getattr(device, 'compute_capability', '')).partition('.')
        capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
        return cls(device.platform, capability, sequence_shards)


def select_implementation(config: ConfigDict, *, target: Target) -> str:
    """Returns the implementation that the model of a resolved config is built with, the same for all layers.

    Args:
      config: resolved model config; `impl` may be 'auto', which takes the first of the architecture's implementations
        (fastest first) that works for the config on the target. Triton is never taken unasked for float32, whose
        exact products have no matrix units, nor in its interpreter, which is there for tests.
      target: where it will run.

    Raises:
      UserError: the implementation that the config chose does not work there; the message says why.
    """
    if config.impl != 'auto':
        reason = why_not(config.impl, config, target)
        if reason is not None:
            raise UserError(f'model.impl={config.impl} needs {reason}')
        return config.impl
    slow_triton = interpreted() or config.dtype != 'bfloat16'
    impls = [impl for impl in ARCHITECTURES[config.name].impls if not (impl == 'triton' and slow_triton)]
    return next(impl for impl in impls if why_not(impl, config, target) is None)


def compiler_options(impl: str) -> dict[str, bool]:
    """Returns what XLA is to be told where a training step of this implementation is compiled.

    In FLASH-Quad, products of a block of keys or queries with the others read a range of rows. XLA's own Triton
    products take that range in, and its autotuner prefers them to a library's with a copy of the range; without them
    the library's products read the range in place (LOG.md). FLASH has no such products and loses nothing by it.
    """
    return {'xla_gpu_enable_triton_gemm': False} if impl == 'triton' else {}


def why_not(impl: str, config: ConfigDict, target: Target) -> str | None:
    """Returns what an implementation needs that the config or the target lacks ("a GPU, this is cpu"), or None."""
    return WHY_NOT[impl](config, target)


def _works_everywhere(config: ConfigDict, target: Target) -> None:
    return None


def _triton(config: ConfigDict, target: Target) -> str | None:
    if target.platform != 'gpu' and not (target.platform == 'cpu' and interpreted()):
        return f'an NVIDIA GPU, this is {target.platform}'
    if target.platform == 'gpu' and (target.compute_capability or (0, 0)) < (9, 0):
        return 'an NVIDIA GPU of compute capability 9.0 or more'
    if not available():
        package, purpose = ('triton', 'test') if interpreted() else ('jax-triton', 'gpu')
        return f'{package} (pip install -r requirements-{purpose}.txt)'
    wanted = {'num_heads': (1,), 'dtype': ('bfloat16', 'float32')}
    if ARCHITECTURES[config.name].attention == 'mixed_chunk':
        wanted |= {'gate': ('silu',), 'branches': ('both',)}
    else:
        wanted['attention_function'] = ('relu2',)
    for field, values in wanted.items():
        if config[field] not in values:
            return f'{field}={" or ".join(map(str, values))}, this is {config[field]}'
    if target.sequence_shards > 1:
        return 'mesh.sequence=1'
    if config.query_key_dim > 256:
        return f'query_key_dim up to 256, this is {config.query_key_dim}'
    return None


def _cudnn(config: ConfigDict, target: Target) -> str | None:
    if target.platform != 'gpu':
        return f'a GPU, this is {target.platform}'
    if target.compute_capability is None or target.compute_capability < (8, 0):
        return 'an NVIDIA GPU of compute capability 8.0 or newer'
    if config.attention_function != 'softmax':
        return f'attention_function=softmax, not {config.attention_function}'
    if config.relative_bias != 'none':
        return f'relative_bias=none, not {config.relative_bias}'
    if config.dtype != 'bfloat16':
        return f'dtype=bfloat16, not {config.dtype}'
    # As wide as the kernels take them, less the columns that tell documents apart (`ops/kernels/cudnn_attention.py`).
    widest = (256 if target.compute_capability >= (9, 0) else 128) - 24
    for layer in range(config.num_layers):
        width = head_dim_at(config, layer)
        if width > widest or width % 8:
            return f'heads of a width that is a multiple of 8 and at most {widest}, not {width}'
    if target.sequence_shards > 1:
        return f'whole sequences on each device, not mesh.sequence={target.sequence_shards}'
    return None


WHY_NOT: dict[str, Callable[[ConfigDict, Target], str | None]] = {
    'triton': _triton,
    'cudnn': _cudnn,
    'xla': _works_everywhere,
    'reference': _works_everywhere,
}
