"""What a model is built for, and what it is then built with: two records, without JAX."""

from typing import Any, NamedTuple


class Target(NamedTuple):
    """What a model is built for.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      compute_capability: of an NVIDIA GPU, as (9, 0); None for anything else.
      sequence_shards: devices that share the tokens of one sequence.
      triton: whether the packages that run Triton kernels there are installed.
      interpreted: whether Triton's kernels are interpreted (for tests on a CPU).
      pallas_interpreted: whether Pallas kernels are (for tests on a CPU).
    """

    platform: str
    compute_capability: tuple[int, int] | None = None
    sequence_shards: int = 1
    triton: bool = False
    interpreted: bool = False
    pallas_interpreted: bool = False

    @classmethod
    def of_device(cls, device: Any, *, sequence_shards: int = 1) -> 'Target':
        """Returns the target that a `jax.Device` is, one of a topology that is only compiled for included."""
        from gau.ops.kernels import launch, pallas

        # An AMD GPU's is a name such as gfx942.
        major, _, minor = str(getattr(device, 'compute_capability', '')).partition('.')
        capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
        interpreted = launch.interpreted(), pallas.interpreted()
        return cls(device.platform, capability, sequence_shards, launch.available(), *interpreted)


class Implementation(NamedTuple):
    """What a model is built with, settled once for all layers (`gau.models.implementations.settle`).

    Attributes:
      attention: a name of the attention record's `implementations`.
      norm: 'triton' has a kernel for the residual stream, its ScaleNorm and the biases of the layers; 'xla'; or
        'recomputed', by XLA, with its float32 arrays computed again in the backward pass.
      loss: 'triton' has a kernel for the loss and the gradient of the logits; 'xla'.
      compiler_options: what XLA is to be told where a training step or a prefill is compiled, as (name, value).
    """

    attention: str
    norm: str = 'xla'
    loss: str = 'xla'
    compiler_options: tuple[tuple[str, bool], ...] = ()
