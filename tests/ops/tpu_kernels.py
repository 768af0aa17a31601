"""Run as a program by test_tpu_kernels.py: compiles the kernels for TPUs and their gradients for one, by libtpu.

Prints, for every case, how many kernels of Pallas the program has.
"""

import functools
import json
import sys

from gau.benchmarks import chips


def main() -> None:
    """Compiles for the topology of the command line."""
    target = chips.target(sys.argv[1])
    import jax
    from jax.sharding import SingleDeviceSharding

    from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
    from gau.ops.kernels.splash_attention import splash_attention
    from gau.ops.mixed_chunk_attention import ChunkSpec
    from gau.ops.scores import Scoring

    def array(*shape, dtype='bfloat16'):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(target.devices[0]))

    def kernels(op, *arrays, ids):
        def loss(arrays, ids):
            return op(*arrays, segment_ids_BN=ids).astype('float32').sum()

        text = jax.jit(jax.value_and_grad(loss)).lower(arrays, ids).compile().as_text()
        return text.count('custom_call_target="tpu_custom_call"')

    found = {}
    for width in (64, 96, 128, 256):
        arrays = [array(2, 2, 1000, width)] * 3
        found[f'splash {width}'] = kernels(
            functools.partial(splash_attention, causal=True), *arrays, ids=array(2, 1000, dtype='int32')
        )
    # Base width; bidirectional; large width with the longest chunk and widest keys; float32.
    for name, causal, n, chunk, s, e, dtype in (
        ('base', True, 600, 256, 128, 1536, 'bfloat16'),
        ('bidirectional', False, 600, 256, 128, 1536, 'bfloat16'),
        ('large', True, 1024, 512, 256, 3072, 'bfloat16'),
        ('narrow', False, 300, 100, 64, 128, 'float32'),
    ):
        spec = ChunkSpec(chunk, Scoring('relu2', 'fixed', 512), causal)
        found[f'flash {name}'] = kernels(
            functools.partial(gated_mixed_chunk, spec=spec, kernels='pallas'),
            *(array(2, n, 2 * e, dtype=dtype), array(2, e, dtype='float32'), *[array(2, n, s, dtype=dtype)] * 4),
            ids=array(2, n, dtype='int32'),
        )
    print(json.dumps(found))


if __name__ == '__main__':
    main()
