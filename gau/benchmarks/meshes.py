"""The same training steps over different meshes of the devices at hand: do they agree, and how fast is each."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from gau.data import pipeline
from gau.errors import UserError
from gau.training import mesh as meshes
from gau.training.batches import put_batch
from gau.training.config import MESH_AXES, resolve
from gau.training.setup import Run

WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Steps:
    """What some training steps over one mesh gave.

    Attributes:
      mesh: sizes of the mesh axes.
      impl: implementation of the attention.
      losses: nats, one a step.
      parameter_norm: L2 norm of all parameters afterwards.
      step_ms: median time of a step after the first ones.
      tokens_per_second: over all devices.
      peak_bytes: of the first device's memory since the process began; None where it does not say.
    """

    mesh: tuple[int, ...]
    impl: str
    losses: tuple[float, ...]
    parameter_norm: float
    step_ms: float
    tokens_per_second: float
    peak_bytes: int | None

    def difference(self, other: 'Steps') -> float:
        """Returns the largest difference between the losses of two runs."""
        return max(abs(x - y) for x, y in zip(self.losses, other.losses, strict=True))


def train_over(config: ConfigDict, shapes: Sequence[tuple[int, ...]], *, steps: int) -> Iterator[Steps]:
    """Trains `steps` steps of a resolved config over each mesh, from the same parameters with the same data.

    Args:
      config: resolved; its own mesh does not count.
      shapes: sizes of the mesh axes data, fsdp, tensor, sequence.
      steps: more than WARM_UP.

    Raises:
      UserError: a mesh does not fit the devices, the batch or the model, or a step the memory.
    """
    for shape in shapes:
        config.mesh = ConfigDict(dict(zip(MESH_AXES, shape, strict=True)))
        run = Run.from_config(resolve(config))
        run.check()
        state, train_step, sharding = run.init_state(), run.train_step(), meshes.batch_sharding(run.mesh)
        iterator = pipeline.train_iterator(
            config.data, objective=config.objective, tokenizer=run.tokenizer, seed=config.seed
        )
        batches = [put_batch(next(iterator), sharding) for _ in range(steps)]
        losses, seconds = [], []
        with run.context():
            try:
                for batch in batches:
                    began = time.perf_counter()
                    state, metrics = train_step(state, batch)
                    losses.append(float(metrics['loss']))
                    seconds.append(time.perf_counter() - began)
            except jax.errors.JaxRuntimeError as error:
                if 'RESOURCE_EXHAUSTED' not in str(error):
                    raise
                mesh = 'x'.join(map(str, shape))
                raise UserError(
                    f'mesh {mesh}: a step does not fit into the memory of a device; '
                    'use a smaller data.batch_size or model.remat=full'
                ) from error
            norm = jax.jit(lambda params: sum((x.astype('float32') ** 2).sum() for x in jax.tree.leaves(params)) ** 0.5)
            parameter_norm = float(norm(state.params))
        median = statistics.median(seconds[WARM_UP:])
        tokens = config.data.batch_size * config.data.context
        stats: dict[str, Any] = jax.devices()[0].memory_stats() or {}
        yield Steps(
            *(shape, run.model.implementation.attention, tuple(losses), parameter_norm),
            *(1000 * median, tokens / median, stats.get('peak_bytes_in_use')),
        )
        del state, batches
