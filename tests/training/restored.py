"""Run as a program by test_restoring.py: checkpoints of one mesh opened on others, on 8 simulated devices.

A process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import jax
import numpy as np
from ml_collections import ConfigDict

from gau.data import pipeline
from gau.training import config as training_config
from gau.training import loop
from gau.training import mesh as meshes
from gau.training.batches import put_batch
from gau.training.checkpoints import Checkpoints
from gau.training.setup import Run
from gau.training.step import TrainState
from tests.training.tiny import read_metrics, tiny_config


def make_config(shape: str, **overrides) -> ConfigDict:
    """Returns a tiny config on the mesh `data,fsdp,tensor,sequence`."""
    sizes = [int(size) for size in shape.split(',')]
    config = tiny_config(
        model__num_layers=1, mesh=ConfigDict(dict(zip(meshes.MESH_AXES, sizes, strict=True))), **overrides
    )
    config.data.batch_size = 8
    config.data.context = 64
    return training_config.resolve(config)


class OnMesh:
    """A run on one mesh, at step 1."""

    def __init__(self, shape: str):
        config = make_config(shape)
        self.config = config
        self.run = Run.from_config(config, devices=jax.devices()[: int(np.prod(list(config.mesh.values())))])
        self.train_step = self.run.train_step()
        self.iterator = pipeline.train_iterator(
            config.data, objective='lm', tokenizer=self.run.tokenizer, seed=config.seed
        )

    def step(self, state: TrainState) -> TrainState:
        """Returns the state after one more batch."""
        batch = put_batch(next(self.iterator), meshes.batch_sharding(self.run.mesh))
        with self.run.context():
            return self.train_step(state, batch)[0]


def largest_difference(left, right) -> float:
    """Largest absolute difference of two trees."""
    return max(float(np.max(np.abs(a - b))) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def matrix(folder: Path, shapes: list[str]) -> dict:
    """Opens the checkpoint of every mesh on every other; returns by pair what differs, and after one more step."""
    runs = {shape: OnMesh(shape) for shape in shapes}
    saved, first, second = {}, {}, {}
    for shape, on in runs.items():
        state = on.step(on.run.init_state())
        saved[shape] = Checkpoints(folder / shape, on.config.checkpoint)
        saved[shape].save(1, state, on.iterator, config={}, data={})
        saved[shape].wait()
        first[shape] = jax.device_get(state)
        second[shape] = jax.device_get(on.step(state))
    report = {}
    for shape, target in runs.items():
        for origin in shapes:
            state = saved[origin].restore(target.run.abstract_state, step=1, iterator=target.iterator)
            params = saved[origin].restore_params(target.run.abstract_params, step=1)
            report[f'{origin} -> {shape}'] = {
                'state': largest_difference(jax.device_get(state), first[origin]),
                'params': largest_difference(jax.device_get(params), first[origin].params),
                'laid_out': all(
                    leaf.sharding == wanted.sharding
                    for leaf, wanted in zip(
                        jax.tree.leaves((state, params)),
                        jax.tree.leaves((target.run.abstract_state, target.run.abstract_params)),
                        strict=True,
                    )
                ),
                'next_step': largest_difference(jax.device_get(target.step(state)), second[origin]),
            }
    return report


def fork(folder: Path, shapes: list[str]) -> list[list[float]]:
    """Forks a run onto another mesh and resumes it on a third; returns its losses and those of a run undisturbed."""
    parent, child, last = shapes
    few = {'optimizer__warmup_steps': 1}
    loop.train(make_config(parent, steps=2, **few), folder / 'parent')
    loop.train(make_config(child, steps=4, fork=str(folder / 'parent'), **few), folder / 'fork')
    # As if the run had been stopped at step 3, before its last checkpoint.
    shutil.rmtree(folder / 'fork' / 'checkpoints' / '4')
    (folder / 'fork' / 'final.json').unlink()
    loop.train(make_config(last, steps=4, **few), folder / 'fork')
    loop.train(make_config(parent, steps=4, **few), folder / 'straight')
    return [
        [row['loss'] for row in read_metrics(folder / name) if row['split'] == 'train' and row['step'] > 2]
        for name in ('fork', 'straight')
    ]


def main() -> None:
    """Runs what the first argument names; prints JSON."""
    name, folder, *shapes = sys.argv[1:]
    print(json.dumps({'matrix': matrix, 'fork': fork}[name](Path(folder), shapes)))


if __name__ == '__main__':
    main()
