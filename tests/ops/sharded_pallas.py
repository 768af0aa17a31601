"""Run as a program by test_tpu_gated_chunks.py: Pallas kernels for TPUs over simulated devices, and alone.

Prints the largest difference of values and gradients, over the largest of either, for every case.
"""

import functools
import json
import os
from typing import Any

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
os.environ['GAU_PALLAS_INTERPRET'] = '1'

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gau.layers.sharding import over_mesh
from gau.models.target import Implementation
from gau.ops.gated_mixed_chunk import gated_mixed_chunk as reference
from gau.ops.kernels import tpu_gated_chunks, tpu_quadratic
from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import Scoring
from gau.training.mesh import AXIS_RULES, MESH_AXES
from tests.models.tiny import make, tokens

N, C, S, E = 64, 8, 4, 16
# One document over all four devices; several, that begin and end on a device and between two, with padding.
DOCUMENTS = [[1] * 60 + [0] * 4, [2] * 14 + [3] * 30 + [0] * 10 + [4] * 10]
BY_TOKEN = ('batch', 'length', None)
MESH = jax.make_mesh((1, 1, 1, 4), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
AXES = [BY_TOKEN, (None, None), *[BY_TOKEN] * 4, (None,), BY_TOKEN, ('batch', 'length')]


def difference(
    *, causal: bool, segments: bool, reduction: str, gated: bool = False, window: int = 1, chunk: int = C
) -> float:
    """Returns the largest relative difference between sharded kernels and the reference alone."""
    rng = np.random.default_rng(0)
    shapes = [(2, N, 2 * E), (2, E), *[(2, N, S)] * 4, (2 * window * chunk - 1,), (2, N, 1), (2, N, E)]
    *arrays, weights = (jnp.asarray(rng.standard_normal(shape), 'float32') for shape in shapes)
    ids = jnp.asarray(DOCUMENTS, jnp.int32) if segments else None
    spec = ChunkSpec(chunk, Scoring('relu2', 'fixed', 8), causal, global_reduction=reduction, window=window)

    def compute(attend):
        def loss(arrays):
            o_BNE = attend(*(arrays if gated else [*arrays[:-1], None]), ids)
            return (o_BNE * weights).sum(), o_BNE

        (_, o_BNE), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return o_BNE, gradients if gated else gradients[:-1]

    def alone(*operands):
        *arrays, bias_P, gate_BN1, ids_BN = operands
        return reference(*arrays, spec=spec, bias_P=bias_P, gate_BN1=gate_BN1, segment_ids_BN=ids_BN)

    def kernels(*operands, sequence_axis):
        assert sequence_axis == 'sequence'
        *arrays, bias_P, gate_BN1, ids_BN = operands
        fields = {'bias_P': bias_P, 'gate_BN1': gate_BN1, 'segment_ids_BN': ids_BN, 'sequence_axis': sequence_axis}
        return gated_mixed_chunk(*arrays, kernels='pallas', spec=spec, **fields)

    wanted = compute(alone)
    with jax.set_mesh(MESH), nn.logical_axis_rules(AXIS_RULES):
        sharded = functools.partial(over_mesh, kernels, axes=AXES, result_like=0, token_multiple=chunk)
        found = compute(sharded)
    return largest(found, wanted)


def model_difference(name: str, **fields: Any) -> float:
    """Returns the same of the gradients of a model, which lays out the operands itself."""
    chunks = {'chunk_size': C} if name == 'flash' else {}
    xla, params = make(name, context=N, num_layers=1, dtype='float32', **chunks, **fields)
    params = jax.tree.map(lambda x: x.astype('float32'), params)
    sequence, ids = tokens(2, N), jnp.asarray(DOCUMENTS)

    def gradient(model):
        logits = lambda params: (model.apply({'params': params}, sequence, segment_ids_BN=ids) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(logits))(params)

    wanted = gradient(xla)
    with jax.set_mesh(MESH), nn.logical_axis_rules(AXIS_RULES):
        return largest(gradient(xla.clone(implementation=Implementation('pallas'))), wanted)


def largest(found: Any, wanted: Any) -> float:
    """Returns the largest relative difference between arrays of two trees."""
    relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, wanted)
    return max(jax.tree.leaves(relative))


def main() -> None:
    """Prints {case: difference}."""
    tpu_gated_chunks.BLOCKS = tpu_quadratic.BLOCKS = (8,)
    cases = [
        {'causal': True, 'segments': True, 'reduction': 'mean'},
        {'causal': True, 'segments': False, 'reduction': 'mean'},
        {'causal': True, 'segments': True, 'reduction': 'mean', 'gated': True},
        {'causal': True, 'segments': False, 'reduction': 'sum', 'gated': True},
        # What a chunk reads comes from the device before, or, of one chunk on each, from the one before that.
        {'causal': True, 'segments': True, 'reduction': 'mean', 'window': 2},
        {'causal': True, 'segments': False, 'reduction': 'sum', 'window': 2, 'chunk': 16},
        {'causal': True, 'segments': True, 'reduction': 'mean', 'gated': True, 'window': 2},
        {'causal': False, 'segments': True, 'reduction': 'mean'},
        {'causal': False, 'segments': False, 'reduction': 'sum'},
    ]
    with jax.default_matmul_precision('highest'):
        found = {str(case): difference(**case) for case in cases}
        found |= {name: model_difference(name) for name in ('flash', 'flash_quad')}
        found['flash, gated'] = model_difference('flash', decay_gate='scalar')
        new = {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2}
        print(json.dumps(found | {'flash, shifted keys, a window of two': model_difference('flash', **new)}))


if __name__ == '__main__':
    main()
