"""Run as a program by test_tpu_gated_chunks.py: compiles kernels for TPUs, and training steps that have them.

Prints, for every case, how many kernels of Pallas the program has. libtpu compiles; no TPU is there.
"""

import functools
import json
import os
import sys

# The tests beside it interpret kernels, which would leave none to compile.
os.environ['GAU_PALLAS_INTERPRET'] = '0'

from gau.benchmarks import chips, compile_check
from gau.benchmarks.hlo import Program
from gau.training.config import default_config


def main() -> None:
    """Compiles for the topology of the command line."""
    target = chips.target(sys.argv[1])
    import jax
    from jax.sharding import SingleDeviceSharding

    from gau.ops.kernels import tpu_quadratic
    from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
    from gau.ops.kernels.splash_attention import splash_attention
    from gau.ops.mixed_chunk_attention import ChunkSpec
    from gau.ops.scores import Scoring

    def array(*shape, dtype='bfloat16'):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(target.devices[0]))

    def kernels(op, *arrays, ids):
        def loss(arrays, ids):
            return op(*arrays, segment_ids_BN=ids).astype('float32').sum()

        return count(Program(jax.jit(jax.value_and_grad(loss)).lower(arrays, ids).compile().as_text()))

    found = {}
    for width in (64, 96, 128, 256):
        arrays = [array(2, 2, 1000, width)] * 3
        found[f'splash {width}'] = kernels(
            functools.partial(splash_attention, causal=True), *arrays, ids=array(2, 1000, dtype='int32')
        )
    # Base width; bidirectional; large width with the longest chunk and widest keys; float32; a gate of the state; a
    # window of two chunks.
    for name, causal, n, chunk, s, e, dtype, gated, window in (
        ('base', True, 600, 256, 128, 1536, 'bfloat16', False, 1),
        ('bidirectional', False, 600, 256, 128, 1536, 'bfloat16', False, 1),
        ('large', True, 1024, 512, 256, 3072, 'bfloat16', False, 1),
        ('narrow', False, 300, 100, 64, 128, 'float32', False, 1),
        ('gated', True, 600, 256, 128, 1536, 'bfloat16', True, 1),
        ('gated large', True, 1024, 512, 256, 3072, 'bfloat16', True, 1),
        ('gated narrow', True, 300, 100, 64, 128, 'float32', True, 1),
        ('window', True, 600, 128, 128, 1536, 'bfloat16', True, 2),
        ('window large', True, 1024, 256, 256, 3072, 'bfloat16', True, 2),
        ('window narrow', True, 300, 100, 64, 128, 'float32', False, 2),
    ):
        spec = ChunkSpec(chunk, Scoring('relu2', 'fixed', 512), causal, window=window)
        arrays = [array(2, n, 2 * e, dtype=dtype), array(2, e, dtype='float32'), *[array(2, n, s, dtype=dtype)] * 4]
        arrays += [array(2, n, 1, dtype='float32')] * gated

        def attend(*arrays, spec=spec, **named):
            gate_BN1 = arrays[6] if len(arrays) > 6 else None
            return gated_mixed_chunk(*arrays[:6], gate_BN1=gate_BN1, spec=spec, kernels='pallas', **named)

        found[f'flash {name}'] = kernels(attend, *arrays, ids=array(2, n, dtype='int32'))
    for name, causal, n, s, e, dtype in (
        ('base', True, 600, 128, 1536, 'bfloat16'),
        ('large', False, 600, 256, 3072, 'bfloat16'),
        ('narrow', True, 300, 64, 128, 'float32'),
    ):
        fields = {'scoring': Scoring('relu2', 'fixed', 512), 'causal': causal}

        def attend(q, k, v, bias_P, fields=fields, **named):
            return tpu_quadratic.quadratic_attention(q, k, v, bias_P=bias_P, **fields, **named)

        arrays = *[array(2, n, s, dtype=dtype)] * 2, array(2, n, e, dtype=dtype), array(2 * n - 1, dtype='float32')
        found[f'flash_quad {name}'] = kernels(attend, *arrays, ids=array(2, n, dtype='int32'))
    # Every sequence on two of four chips.
    for name, fields in (
        ('flash', {}),
        ('flash gated', {'name': 'flash', 'decay_gate': 'scalar'}),
        ('flash window', {'name': 'flash', 'decay_gate': 'scalar', 'local_window': 2, 'key_input': 'shifted'}),
        ('flash_quad', {}),
        ('transformer_plus_plus', {}),
    ):
        config = default_config()
        config.model.update({'name': name, 'num_layers': 2} | fields)
        config.data.update({'context': 1024, 'batch_size': 4})
        config.mesh.update({'data': 2, 'sequence': 2})
        found[f'step {name}'] = count(compile_check.check(config, target, vocab_size=1024).program)
    print(json.dumps(found))


def count(program: Program) -> int:
    """Returns how many kernels of Pallas a compiled program runs."""
    return sum(times for instruction, _, times in program.runs if instruction.is_custom_kernel)


if __name__ == '__main__':
    main()
