"""Run as a program by test_sharding.py: the vocabulary loss with every device's own tokens, and alone.

A process of its own, since the number of devices is fixed when JAX starts. Prints the largest difference of the loss
and of its gradients, over the largest of either, for every case.
"""

import json
import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gau.layers.sharding import sum_over_mesh
from gau.ops.cross_entropy import weighted_cross_entropy
from gau.training.mesh import AXIS_RULES, MESH_AXES

D, V = 6, 11
# Of the last two, one cannot cut the texts and the other neither texts nor tokens: then all devices have all of it.
CASES = {
    'rows': ((4, 2, 1, 1), 8, 5),
    'rows and tokens': ((2, 1, 1, 4), 2, 12),
    'besides a tensor axis': ((2, 1, 4, 1), 2, 5),
    'tokens': ((2, 1, 1, 4), 3, 12),
    'nothing': ((2, 1, 1, 4), 3, 5),
}


def difference(sizes, batch, n) -> float:
    """Returns the largest relative difference between devices together and one alone."""
    rng = np.random.default_rng(0)
    h, embedding = jnp.asarray(rng.normal(size=(batch, n, D))), jnp.asarray(rng.normal(size=(V, D)))
    targets, weights = jnp.asarray(rng.integers(0, V, (batch, n))), jnp.asarray(rng.uniform(size=(batch, n)))

    def compute(asked):
        def one(*operands, alone):
            asked.append((alone, operands[0].shape))
            return weighted_cross_entropy(*operands, positions_per_slice=3)

        def loss(h, embedding):
            axes = [('batch', 'length', None), (None, None), ('batch', 'length'), ('batch', 'length')]
            # The factor stands for what the loss is divided by.
            return 3 * sum_over_mesh(one, h, embedding, targets, weights, axes=axes)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(h, embedding)

    asked = []
    alone = compute(asked)
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        spread = compute(asked)
    whole, *parts = asked
    rows, tokens = sizes[0] * sizes[1], sizes[3]
    shape = (batch // rows if batch % rows == 0 else batch, n // tokens if n % tokens == 0 else n, D)
    assert whole == (True, (batch, n, D)), whole
    assert set(parts) == {(True, shape)}, parts
    with jax.set_mesh(mesh):
        compute(asked)
    # A mesh without rules is the compiler's: what only one device can do is not for this.
    assert asked[-1] == (False, (batch, n, D)), asked[-1]
    relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), spread, alone)
    return max(jax.tree.leaves(relative))


if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    print(json.dumps({name: difference(*case) for name, case in CASES.items()}))
