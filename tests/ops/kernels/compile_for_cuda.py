"""Run by a test, without Triton's interpreter: compiles kernels for an H100, as they are launched, without a GPU.

    python -m tests.ops.kernels.compile_for_cuda decode|prefill|chunks|softmax|far

Prints a line for each kernel: its name, the bytes of its machine code and those of its shared memory, the registers of
a thread and the bytes of its stack, which is where registers are spilled to.
"""

import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gau.ops.chunk_window import open_window
from gau.ops.decoding import DecodePosition
from gau.ops.kernels import compat, decode_row
from gau.ops.kernels.decode_cache import decode_with_cache
from gau.ops.kernels.decode_chunks import Parameters, decode_gated_chunks
from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
from gau.ops.kernels.gated_mixed_chunk_block import gated_mixed_chunk_block
from gau.ops.kernels.gated_quadratic import gated_quadratic_attention
from gau.ops.kernels.prefill_chunks import prefill_gated_chunks
from gau.ops.kernels.queries_keys import queries_and_keys
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.scores import Scoring

H100 = GPUTarget('cuda', 90, 32)
TYPES = {'bfloat16': 'bf16', 'float32': 'fp32', 'int32': 'i32'}
DTYPE, D, E, S, C = 'bfloat16', 768, 1536, 128, 256
SPEC = ChunkSpec(C, Scoring('relu2', 'paper'), True)


def compile_only(kernel, inputs, outputs, *, grid, num_warps, num_stages, overwrite, constants):
    """Stands for `compat.triton_call`; the results are zeros."""
    del grid, overwrite
    pointers = [name for name in kernel.arg_names if name not in constants]
    signature = {name: 'constexpr' for name in constants}
    signature |= {name: f'*{TYPES[str(x.dtype)]}' for name, x in zip(pointers, [*inputs, *outputs], strict=True)}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {places[name]: value for name, value in constants.items()},
        # JAX's arrays are aligned.
        {places[name]: [['tt.divisibility', 16]] for name in pointers},
    )
    compiled = triton.compile(source, target=H100, options={'num_warps': num_warps, 'num_stages': num_stages})
    code = compiled.asm['cubin']
    print(kernel.__name__, len(code), compiled.metadata.shared, *registers_and_stack(code))
    return [jnp.zeros(output.shape, output.dtype) for output in outputs]


def registers_and_stack(code):
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(code)
        file.flush()
        usage = subprocess.run([tool, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    return re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()


def zeros(*shape, dtype=DTYPE):
    return jnp.zeros(shape, dtype)


def parameters():
    vector = {'dtype': 'float32'}
    return Parameters(
        *(zeros(**vector), zeros(D, 2, E), zeros(2, E, **vector), zeros(D, S), zeros(S, **vector)),
        *(zeros(4, S, **vector), zeros(4, S, **vector), zeros(E, D), zeros(D, **vector)),
        zeros(2 * C - 1, **vector),
    )


def shift_and_gate():
    return {
        'mix_S': zeros(S, dtype='float32'),
        'gate_D': zeros(D, dtype='float32'),
        'gate_bias': zeros(1, dtype='float32'),
    }


def decode():
    """Every kernel of decoding at size base, for one row and for many."""
    vector = {'dtype': 'float32'}
    for batch in (1, 8, 64):
        at_B = jnp.zeros(batch, jnp.int32)
        position = DecodePosition(at_B, at_B + 1, at_B)
        state = {'k': zeros(batch, C, S), 'k_lin': zeros(batch, C, S), 'v': zeros(batch, C, E)}
        state['sum'] = zeros(batch, S, E, **vector)
        table = (zeros(batch, S // 2, **vector),) * 2
        gate = {'gate': zeros(batch, C, 1, **vector), 'count': zeros(batch, 1, **vector)}
        # With shifted keys, a gate and a window of two chunks kernels do all that they do without, and more.
        two = SPEC._replace(window=2, chunk_size=C // 2)
        plain, all_of_it = ({}, {}, SPEC), (gate | {'before': zeros(batch, S)}, shift_and_gate(), two)
        for more, fields, spec in (plain, all_of_it)[batch > 1 :]:
            window = open_window({name: x for name, x in (state | more).items() if name != 'before'}, 32)
            window |= {name: x for name, x in more.items() if name == 'before'}
            found = parameters()._replace(**fields)
            decode_gated_chunks(zeros(batch, D), found, table, window, position=position, spec=spec)
        if batch == 8:
            continue
        for function, normalizer, heads, s, e in (('softmax', None, 12, 64, 64), ('relu2', 'fixed', 1, S, E)):
            q, v = zeros(batch, heads, 1, s), zeros(batch, heads, 1, e)
            cache = {'k': zeros(batch, heads, 512, s), 'v': zeros(batch, heads, 512, e)}
            decode_with_cache(q, q, v, cache, position=position, scoring=Scoring(function, normalizer))
    queries_keys = [zeros(batch, C, S)] * 4
    p, bias = zeros(batch, C, 2 * E + S), zeros(2, E, **vector)
    fields = {'position': position, 'spec': SPEC, 'bias_P': parameters().bias_P}
    gated_mixed_chunk_block(p, bias, *queries_keys, state, **fields)


def token_with_far_chunks(batch):
    """A token of each row with shifted keys, a gate, windows of two chunks of 128, and four of 64 far chunks."""
    vector, size, groups = {'dtype': 'float32'}, C // 2, 64
    at_B = jnp.zeros(batch, jnp.int32)
    state = {'k': zeros(batch, C, S), 'k_lin': zeros(batch, C, S), 'v': zeros(batch, C, E)}
    state |= {'sum': zeros(batch, S, E, **vector), 'gate': zeros(batch, C, 1, **vector)}
    state |= {'count': zeros(batch, 1, **vector), 'far_mean': zeros(batch, groups, S, **vector)}
    state |= {'far_k': zeros(batch, groups * size, S), 'far_v': zeros(batch, groups * size, E)}
    state |= {'far_query': zeros(batch, S, **vector), 'far_index': zeros(batch, 4, dtype='int32')}
    window = open_window(state, 32) | {'before': zeros(batch, S)}
    scales = {name: zeros(6, S, **vector) for name in ('gamma_RS', 'beta_RS')}
    found, table = parameters()._replace(**shift_and_gate(), **scales), (zeros(batch, S // 2, **vector),) * 2
    fields = {'position': DecodePosition(at_B, at_B + 1, at_B), 'spec': SPEC._replace(window=2, chunk_size=size)}
    decode_gated_chunks(zeros(batch, D), found, table, window, **fields)


def prompts():
    """The kernels of short and of long prompts at size base, and of shifted queries and keys."""
    vector = {'dtype': 'float32'}
    shift, scales = (zeros(S, **vector), zeros(1, C, **vector)), zeros(4, S, **vector)

    def roles(p):
        return queries_and_keys(p, zeros(S, **vector), scales, scales, None, shift, rotated=0)

    primals, pull = jax.vjp(roles, zeros(1, C, 2 * E + S))
    pull(primals)

    table = (zeros(1, 4 * C, S // 2, dtype='float32'),) * 2
    state = {'k': zeros(1, C, S), 'k_lin': zeros(1, C, S), 'v': zeros(1, C, E), 'sum': zeros(1, S, E, dtype='float32')}
    gate = {'gate': zeros(1, C, 1, **vector), 'count': zeros(1, 1, **vector)}
    two = SPEC._replace(window=2, chunk_size=C // 2)
    plain, all_of_it = ({}, {}, SPEC), (gate | {'before': zeros(1, S)}, shift_and_gate(), two)
    for (more, fields, spec), reader in ((plain, 'short'), (all_of_it, 'short'), (plain, 'long'), (all_of_it, 'long')):
        found = parameters()._replace(**fields)
        position = DecodePosition(jnp.zeros(1, jnp.int32), jnp.full(1, 4 * C, jnp.int32), reader=reader)
        prefill_gated_chunks(zeros(1, 4 * C, D), found, table, state | more, position=position, spec=spec)


def chunks():
    """The kernels of FLASH's training at size base: with states, in two chunks without, and windows of two chunks."""
    bias_2E, bias_P = zeros(2, E, dtype='float32'), zeros(4 * C - 1, dtype='float32')
    two_ways = SPEC._replace(causal=False)
    for n, spec, gated in (
        *((4 * C, SPEC, False), (4 * C, two_ways, False), (2 * C, SPEC, False), (2 * C, two_ways, False)),
        *((4 * C, SPEC._replace(window=2), True), (2 * C, SPEC._replace(window=2), False)),
    ):
        p, queries_keys = zeros(1, n, 2 * E + S), [zeros(1, n, S)] * 4
        fields = {'spec': spec, 'bias_P': bias_P if spec.window == 2 else bias_P[: 2 * C - 1]}
        fields['gate_BN1'] = zeros(1, n, 1, dtype='float32') if gated else None
        o, pull = jax.vjp(lambda *x, fields=fields: gated_mixed_chunk(*x, **fields), p, bias_2E, *queries_keys)
        pull(o)


def softmax():
    """Every kernel of training FLASH and FLASH-Quad with softmax at size base, with documents."""
    n, scoring, ids = 4 * C, Scoring('softmax', None), {'segment_ids_BN': jnp.ones((1, 4 * C), jnp.int32)}
    flash = functools.partial(gated_mixed_chunk, spec=SPEC._replace(scoring=scoring), **ids)
    quad = functools.partial(gated_quadratic_attention, scoring=scoring, causal=True, **ids)
    p, bias_2E, q = zeros(1, n, 2 * E + S), zeros(2, E, dtype='float32'), zeros(1, n, S)
    for op, arrays, positions in ((flash, [q] * 4, C), (quad, [q] * 2, n)):
        bias_P = zeros(2 * positions - 1, dtype='float32')
        o, pull = jax.vjp(lambda bias_P, *x, op=op: op(*x, bias_P=bias_P), bias_P, p, bias_2E, *arrays)
        pull(o)


def far():
    """Every kernel of FLASH with far chunks at size base, in chunks of 256 and windows of two of 128, and at small.

    And those of a token at size base.
    """
    for batch in (1, 8, 64):
        token_with_far_chunks(batch)
    for size, width, window in ((C, E, 1), (C // 2, E, 2), (C, E // 2, 1)):
        n, ids = 8 * size, jnp.ones((1, 8 * size), jnp.int32)
        fields = {'spec': SPEC._replace(chunk_size=size, window=window), 'segment_ids_BN': ids, 'far_chunks': 4}
        p, bias_2E, q = zeros(1, n, 2 * width + S), zeros(2, width, dtype='float32'), zeros(1, n, S)

        def op(*x, fields=fields):
            return gated_mixed_chunk(*x[:6], far_BNS=x[6:], **fields)

        o, pull = jax.vjp(op, p, bias_2E, *[q] * 6)
        pull(o)


if __name__ == '__main__':
    compat.triton_call = compile_only
    decode_row.streaming_multiprocessors = lambda: 132
    with jax.disable_jit():
        what = {'decode': decode, 'prefill': prompts, 'chunks': chunks, 'softmax': softmax, 'far': far}
        what[sys.argv[1]]()
