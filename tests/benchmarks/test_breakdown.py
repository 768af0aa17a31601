"""Where cycles and bytes go, on a program small enough to count by hand."""

import pytest

from gau.benchmarks.breakdown import Cost, Place, costs, describe, place
from gau.benchmarks.hlo import Instruction, Program

MODEL = 'LanguageModel.hidden/LanguageModel._stack'
FORWARD = f'jit(train_step)/jvp(LanguageModel.weighted_loss)/{MODEL}'
BACKWARD = f'jit(train_step)/transpose(jvp(LanguageModel.weighted_loss))/{MODEL}'


def line(name, operand, source, cycles):
    """A kernel that reads and writes 4 KiB."""
    config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    metadata = f'metadata={{op_name="{source}" stack_frame_id=1}}' if source else ''
    return f'  %{name} = f32[1024]{{0}} copy(%{operand}), {metadata}, {config}'


def program(*kernels):
    lines = [line(f'k{i}', f'k{i - 1}' if i else 'x', *kernel) for i, kernel in enumerate(kernels)]
    return Program(
        'ENTRY %main (x: f32[1024]) -> f32[1024] {\n  %x = f32[1024] parameter(0)\n' + '\n'.join(lines) + '\n}'
    )


@pytest.mark.parametrize(('source', 'expected'), [
    (f'{FORWARD}/blocks_0/blocks_0.residual/gau/uv/dot_general', Place('forward', 'blocks/gau/uv', 'dot_general')),
    (f'{BACKWARD}/blocks_11/blocks_11.residual/gau/core/jit(mixed_chunk_attention)/BGCS,BGCE->BGSE/dot_general',
     Place('backward', 'blocks/gau/core', 'BGCS,BGCE->BGSE')),
    (f'{FORWARD}/while/body/closed_call/blocks/gau/jit(silu)/mul', Place('forward', 'blocks/gau', 'mul')),
    (f'{BACKWARD}/while/body/closed_call/checkpoint/rematted_computation/blocks/norm/mul',
     Place('recompute', 'blocks/norm', 'mul')),
    (f'{FORWARD}/while/body/dynamic_update_slice', Place('forward', 'blocks', 'dynamic_update_slice')),
    ('jit(train_step)/jvp(LanguageModel.weighted_loss)/while/body/closed_call/reduce_sum',
     Place('forward', 'loss', 'reduce_sum')),
    ('jit(train_step)/integer_pow', Place('step', 'update', 'integer_pow')),
    ('', Place('step', 'unnamed', 'copy')),
])  # fmt: skip
def test_the_place_of_a_name(source, expected):
    attributes = f'op_name="{source}"' if source else ''
    assert place(Instruction('k', 'copy', (), (), attributes, is_root=False)) == expected


def test_layers_are_taken_together_and_nothing_is_left_out():
    layers = [(f'{FORWARD}/blocks_{i}/gau/uv/dot_general', 5) for i in range(3)]
    found = costs(program(*layers, ('', 2), ('jit(train_step)/mul', 2**63 - 1)))
    assert found == {
        Place('forward', 'blocks/gau/uv', 'dot_general'): Cost(3, 15, 0, 3 * 8192, 0),
        Place('step', 'unnamed', 'copy'): Cost(1, 2, 0, 8192, 0),
        Place('step', 'update', 'mul'): Cost(1, 0, 1, 8192, 0),
    }


def test_tables_are_sorted_and_sum_up():
    text = describe(program(('jit(f)/jvp(M)/a/add', 3000), ('jit(f)/jvp(M)/b/mul', 7000), ('', 2**63 - 1)), 1e6, rows=2)
    parts, operations = text.split('\n\n')
    words = [row.split() for row in parts.splitlines()[1:]]
    assert words[0] == ['forward', 'b', '1', '7.000', '70.0', '0.0', '0.0']
    assert words[1][:4] == ['forward', 'a', '1', '3.000']
    assert words[2][:4] == ['1', 'more', '1', '-?'], 'the compiler has no estimate'
    assert words[3][:3] == ['all', '3', '10.000?']
    assert [row.split()[1:3] for row in operations.splitlines()[1:3]] == [['b:', 'mul'], ['a:', 'add']]
