"""Run as a program by test_sharding.py: attention with its tokens spread over simulated devices, and alone.

A process of its own, since the number of devices is fixed when JAX starts. Prints the largest difference of values and
gradients, over the largest of either, for every case.
"""

import json
import os
import sys

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gau.layers.sharding import attention_over_mesh
from gau.ops.mixed_chunk_attention import ChunkSpec, mixed_chunk_attention
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring
from gau.training.mesh import AXIS_RULES, MESH_AXES

B, N, C, S, E = 2, 64, 8, 4, 8

# Documents of one row cross the borders of shards of 8 and 16 tokens and of chunks, one spans several shards, padding
# fills a shard's beginning, its end and the whole of one; the other row is cut into short ones.
LONG = [3] * 5 + [0] * 3 + [1] * 31 + [0] * 18 + [2] * 7
SHORT = [1] * 3 + [2] * 9 + [3] * 17 + [4] * 2 + [5] * 33


def cases(*, every: bool):
    """Yields name, mesh, heads, op, causal, segments."""
    meshes = ((1, 1, 1, 8), (1, 2, 2, 2), (2, 1, 1, 4), (1, 1, 2, 4)) if every else ((1, 1, 2, 4),)
    for shape in meshes:
        for heads in (1, 4) if every else (1,):
            gated = ('mixed_chunk with gate',) if heads == 1 else ()
            for op in ('mixed_chunk', *gated, 'quadratic'):
                for causal in (True,) if 'with' in op else (True, False):
                    for segments in (True, False) if every else (True,):
                        yield f'{shape} {heads} {op} {causal=} {segments=}', shape, heads, op, causal, segments


def difference(shape, heads, op, causal, segments) -> float:
    """Returns the largest relative difference between sharded and alone."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    q, k, q_lin, k_lin = (draw(B, heads, N, S) for _ in range(4))
    v, weights = draw(B, heads, N, E), draw(B, heads, N, E)
    ids = jnp.asarray([LONG, SHORT], jnp.int32) if segments else None
    options = {'scoring': Scoring('relu2', 'paper'), 'causal': causal, 'impl': 'xla'}
    if op != 'quadratic':
        gate, window = (draw(B, heads, N, 1), 2) if 'gate' in op else (None, 1)
        operands, bias, multiple = (q, k, q_lin, k_lin, gate, v), draw(heads, window * C, window * C), C
        spec = ChunkSpec(C, Scoring('relu2', 'paper'), causal, window=window)

        def attend(*x, segment_ids_BN, sequence_axis):
            *x, gate_BN1, v_BNE, bias = x
            fields = {'gate_BN1': gate_BN1, 'segment_ids_BN': segment_ids_BN, 'sequence_axis': sequence_axis}
            return mixed_chunk_attention(*x, v_BNE, bias_CC=bias, spec=spec, **fields)
    else:
        operands, bias, multiple = (q, k, v), draw(heads, 2 * N - 1), 1

        def attend(*x, segment_ids_BN, sequence_axis):
            *x, bias = x
            return quadratic_attention(
                *x, bias_P=bias, segment_ids_BN=segment_ids_BN, sequence_axis=sequence_axis, **options
            )

    def loss(bias, *operands):
        o_BHNE = attention_over_mesh(attend, *operands, bias=bias, segment_ids_BN=ids, token_multiple=multiple)
        return (o_BHNE * weights).sum(), o_BHNE

    def compute():
        # A function of its own each time: the mesh decides what is traced.
        with_gradients = jax.value_and_grad(lambda *x: loss(*x), argnums=range(1 + len(operands)), has_aux=True)
        return jax.jit(with_gradients)(bias, *operands)

    alone = compute()
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        sharded = compute()
    relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), sharded, alone)
    return max(jax.tree.leaves(relative))


def main() -> None:
    """Prints {case: difference}."""
    jax.config.update('jax_enable_x64', True)
    report = {name: difference(*case) for name, *case in cases(every=sys.argv[1] == 'every')}
    print(json.dumps(report))


if __name__ == '__main__':
    main()
