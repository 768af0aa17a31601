"""Run as a program by test_splash_attention.py: splash attention over simulated devices, and alone.

Prints the largest difference of values and gradients, over the largest of either, for every case.
"""

import json
import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['GAU_PALLAS_INTERPRET'] = '1'

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gau.layers.common import TokenInfo
from gau.layers.quadratic import QuadraticCore
from gau.ops.scores import Scoring
from gau.training.mesh import AXIS_RULES, MESH_AXES

B, H, N, K = 2, 2, 120, 64
# A document that spans the four devices of a row, and one that begins in the middle of one; padding after both.
DOCUMENTS = [[1] * 100 + [0] * 20, [1] * 40 + [2] * 75 + [0] * 5]


def difference(*, causal: bool, segments: bool) -> float:
    """Returns the largest relative difference between sharded and alone."""
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(B, H, N, K)), 'float32') for _ in range(4))
    ids = jnp.asarray(DOCUMENTS, jnp.int32) if segments else None
    core = QuadraticCore(causal, 'splash', 'float32', num_heads=H, width=K, scoring=Scoring('softmax', None))
    tokens = TokenInfo(ids, None, {})

    def compute():
        def loss(q, k, v):
            o_BHNK = core.apply({}, [q, k], v, tokens)
            return (o_BHNK * weights).sum(), o_BHNK

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    alone = compute()
    mesh = jax.make_mesh((1, 1, 2, 4), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        sharded = compute()
    relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), sharded, alone)
    return max(jax.tree.leaves(relative))


def main() -> None:
    """Prints {case: difference}."""
    cases = [{'causal': causal, 'segments': segments} for causal in (True, False) for segments in (True, False)]
    print(json.dumps({str(case): difference(**case) for case in cases}))


if __name__ == '__main__':
    main()
