"""Run as a program by test_sharding.py: trains a few steps on 8 simulated devices, for each mesh named, and compares.

A process of its own, since the number of devices is fixed when JAX starts.
"""

import json
import math
import os
import re
import sys

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import jax
import numpy as np
from ml_collections import ConfigDict

from gau.training import config as training_config
from gau.training import mesh as meshes
from gau.training.batches import put_batch
from gau.training.setup import Run
from tests.training.tiny import tiny_config

AXES = meshes.MESH_AXES
STEPS = 3


def losses_and_params(config: ConfigDict, devices: list[jax.Device]) -> tuple[list[float], dict, dict]:
    """Trains STEPS steps on `devices`; returns losses, parameters, and what the first device holds.

    That is: bytes of state, bytes of arguments, and numbers in the largest array of its program over those of its share
    of the logits of a batch, which are by far the largest array of a run with short texts.
    """
    run = Run.from_config(config, devices=devices)
    state, train_step = run.init_state(), run.train_step()
    iterator = run.objective.train_batches(config.data, tokenizer=run.tokenizer, seed=config.seed)
    losses = []
    with run.context():
        for _ in range(STEPS):
            state, metrics = train_step(state, put_batch(next(iterator), meshes.batch_sharding(run.mesh)))
            losses.append(float(metrics['loss']))
        compiled = train_step.lower(state, put_batch(next(iterator), meshes.batch_sharding(run.mesh))).compile()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    largest = max(math.prod(map(int, shape.split(','))) for shape in re.findall(r'f32\[([\d,]+)\]', compiled.as_text()))
    logits = config.data.batch_size * config.data.context * run.tokenizer.vocab_size
    memory = {
        'state_bytes': held,
        'argument_bytes': compiled.memory_analysis().argument_size_in_bytes,
        'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
        'largest_array': largest / (logits / len(devices)),
    }
    return losses, jax.device_get(state.params), memory


def main() -> None:
    """Compares every mesh with one device, for one model and objective; prints a JSON object."""
    model, objective, sharding, *shapes = sys.argv[1:]
    report = {}
    alone = None
    for shape in ['1,1,1,1', *shapes]:
        sizes = [int(size) for size in shape.split(',')]
        config = tiny_config(
            objective=objective, model__name=model, mesh=ConfigDict(dict(zip(AXES, sizes, strict=True)))
        )
        if model == 'transformer_plus_plus':
            config.model.query_key_dim = config.model.chunk_size = None
            config.model.num_heads = 4
            config.model.feed_forward_dim = 64
        if model == 'flash_quad':
            config.model.chunk_size = None
        # Its neighbours may lie on another device.
        config.model.short_convolution = 2
        config.data.batch_size = 8
        config.data.context = 64
        config.optimizer.learning_rate = 1e-2
        config.optimizer.sharding = sharding
        config = training_config.resolve(config)
        losses, params, memory = losses_and_params(config, jax.devices()[: int(np.prod(sizes))])
        if alone is None:
            alone = (losses, params)
        difference = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), params, alone[1])
        report[shape] = {
            'loss_difference': max(abs(a - b) for a, b in zip(losses, alone[0], strict=True)),
            'parameter_difference': max(jax.tree.leaves(difference)),
            **memory,
        }
    print(json.dumps(report))


if __name__ == '__main__':
    main()
