"""What a model is built with: what `model.impl` chose, or the fastest that works where it is built, settled once.

`auto` stays `auto` in a config and is settled where a model is built, so a run can go on on another chip. A new
implementation of an attention is an entry of its record's `implementations`, before the slower ones.
"""

from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.target import Implementation, Target


def settle(config: ConfigDict, *, target: Target) -> Implementation:
    """Returns what the model of a resolved config is built with, the same for all layers.

    Args:
      config: resolved model config; `impl` may be 'auto', which takes the first implementation of the attention's
        record (fastest first) that works for the config on the target and is worth it.
      target: where it will run.

    Raises:
      UserError: the implementation that the config chose does not exist or work there; the message says why.
    """
    attention = _attention(config, target)
    family = ARCHITECTURES[config.name].family
    kernels = attention == 'triton' or (attention == 'cudnn' and target.triton and not target.interpreted)
    scale_norm = config.norm == 'scale_norm' and config.norm_placement == 'pre'
    apart = scale_norm and family.leaves_bias_to_norm(config, attention)
    # In FLASH-Quad, matmuls of a block of keys or queries with the others read a range of rows. XLA's own Triton
    # matmuls take that range in, and its autotuner prefers them to a library's with a copy of the range; without them
    # the library's matmuls read the range in place (LOG.md, L11). FLASH has no such matmuls and loses nothing by it.
    options = (('xla_gpu_enable_triton_gemm', False),) if attention == 'triton' else ()
    # What a scan of layers saves is stacked in main memory, of every norm three float32 arrays, which a TPU makes again
    # in less time (LOG.md, L44). On a CPU the losses would move by a bit, and nobody has asked a GPU.
    again = target.platform == 'tpu' and config.layer_stack == 'scan'
    norm = 'triton' if apart else 'recomputed' if again else 'xla'
    return Implementation(attention, norm, 'triton' if kernels else 'xla', options)


def lacks(config: ConfigDict, target: Target) -> str | None:
    """Returns what the chosen implementation needs that config or target lack ("a GPU, this is cpu"), or None.

    Raises:
      UserError: the attention has no such implementation.
    """
    if config.impl == 'auto':
        return None
    needs = ARCHITECTURES[config.name].attention.implementations
    if config.impl not in needs:
        raise UserError(f'model.impl={config.impl} does not exist for {config.name}; choose from {", ".join(needs)}')
    return needs[config.impl].lacks(config, target)


def _attention(config: ConfigDict, target: Target) -> str:
    reason = lacks(config, target)
    if reason is not None:
        raise UserError(f'model.impl={config.impl} needs {reason}')
    if config.impl != 'auto':
        return config.impl
    implementations = ARCHITECTURES[config.name].attention.implementations
    works = (
        impl
        for impl, needs in implementations.items()
        if needs.worth(config, target) and needs.lacks(config, target) is None
    )
    return next(works)
