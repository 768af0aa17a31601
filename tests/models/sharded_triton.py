"""Run as a program by test_triton.py: models of the fused kernels on two simulated devices, and on one.

A process of its own, since the number of devices is fixed when JAX starts. Prints the largest difference of loss and
gradients, over the largest of either, for every case.
"""

import json
import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=2'

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gau.training.mesh import AXIS_RULES, MESH_AXES, shardings
from tests.models.tiny import make, positions_of, tokens

IDS = jnp.asarray([[1] * 7 + [2] * 3, [3] * 4 + [0] * 2 + [4] * 4])
MESHES = {'data': (2, 1, 1, 1), 'fsdp': (1, 2, 1, 1), 'tensor': (1, 1, 2, 1)}


def main() -> None:
    """Prints {case: difference}."""
    report = {}
    small = {'chunk_size': 3, 'far_chunks': 2}
    for name, objective, fields in (
        ('flash', 'mlm', {}),
        ('flash', 'lm', {'local_window': 2, 'decay_gate': 'scalar', 'key_input': 'shifted', **small}),
        ('flash_quad', 'lm', {'key_input': 'shifted'}),
    ):
        model, params = make(name, objective, impl='triton', dtype='float32', num_layers=1, **fields)
        # A vocabulary that two devices can share.
        model = model.clone(vocab_size=12)
        params['embedding']['kernel'] = jnp.pad(params['embedding']['kernel'], ((0, 1), (0, 0)), constant_values=0.1)
        weights = (IDS > 0).astype('float32')
        boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))['params']

        # Positions, and with them the table that rotates queries and keys: of every row, or one for all.
        named = {'positions_BN': positions_of(IDS) if name == 'flash' else None, 'method': 'weighted_loss'}

        def loss(params, sequence, ids, weights, model=model, named=named):
            return model.apply({'params': params}, sequence, sequence, weights, segment_ids_BN=ids, **named)

        batch = tokens(2, 10), IDS, weights
        # A function of its own each time: the mesh decides what is traced.
        alone = jax.jit(jax.value_and_grad(loss))(params, *batch)
        for axis, sizes in MESHES.items():
            mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
            placed = jax.device_put(params, shardings(boxed, mesh))
            rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
            with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
                step = jax.jit(jax.value_and_grad(lambda *args, loss=loss: loss(*args)))
                found = step(placed, *rows)
            relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, alone)
            report[f'{name} {objective} {axis}=2'] = max(jax.tree.leaves(relative))
    print(json.dumps(report))


if __name__ == '__main__':
    main()
