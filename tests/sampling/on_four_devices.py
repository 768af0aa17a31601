"""Writes text on four simulated devices: on one of them, the rows spread, the layers split; prints all three."""

import json
import os

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gau.sampling import generation
from gau.sampling.generation import SamplingParams
from gau.training.mesh import make_mesh, shardings
from tests.models import tiny

PROMPTS = [np.arange(1, n, dtype=np.int32) for n in (3, 9, 7, 2)]


def main() -> None:
    """Prints one line of JSON last."""
    written = {}
    # Of scanned layers the state's rows are cut along another dimension than its positions.
    model, params = tiny.make('flash', dtype='float32', layer_stack='scan', num_layers=1)
    for devices in (1, 4):
        prefilled = generation.prefill(model, params, PROMPTS, max_tokens=9, devices=devices)
        rows = prefilled.repeated(model, 2)
        fields = {'max_tokens': 9, 'sampling': SamplingParams(), 'seed': 1, 'block': 6, 'devices': devices}
        written[devices] = np.concatenate(list(generation.decode(model, params, rows, **fields)), axis=1).tolist()
    tokens = jax.ShapeDtypeStruct((1, 1), 'int32')
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
    mesh = make_mesh(ConfigDict({'data': 1, 'fsdp': 1, 'tensor': 4, 'sequence': 1}))
    # The vocabulary of 11 does not divide.
    lies = shardings(boxed | {'embedding': {}}, mesh) | {'embedding': NamedSharding(mesh, PartitionSpec())}
    split = jax.device_put(params, lies)
    rows = generation.prefill(model, split, PROMPTS, max_tokens=9).repeated(model, 2)
    cut = {axis for leaf in jax.tree.leaves(rows.state) for axis in leaf.sharding.spec}
    assert 'tensor' in cut, 'the state is whole on every device'
    blocks = generation.decode(model, split, rows, **fields | {'devices': 1})
    written['tensor'] = np.concatenate(list(blocks), axis=1).tolist()
    print(json.dumps(written))


if __name__ == '__main__':
    main()
