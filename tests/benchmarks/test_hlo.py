"""The reader of compiled programs, on programs small enough to count by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from gau.benchmarks.hlo import ON_CHIP, Program
from gau.training.traced import flops

LOOP = """HloModule example

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[10,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[10,8]{1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
}

%condition (c: (s32[], f32[10,8])) -> pred[] {
  %c = (s32[], f32[10,8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (d: (s32[], f32[10,8])) -> (s32[], f32[10,8]) {
  %d = (s32[], f32[10,8]) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %x = f32[10,8]{1,0:T(8,128)} get-tuple-element(%d), index=1
  %row = f32[1,8]{1,0:T(8,128)S(1)} fusion(%x, %j), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
  %total = f32[1,8]{1,0:T(8,128)S(1)} all-reduce(%row), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[10,8]) tuple(%j, %x)
}

ENTRY %main (x: f32[10,8]) -> f32[10,8] {
  %x.1 = f32[10,8]{1,0:T(8,128)} parameter(0)
  %start = s32[] constant(0)
  %in = (s32[], /*index=1*/f32[10,8]) tuple(%start, %x.1)
  %loop = (s32[], f32[10,8]) while(%in), condition=%condition, body=%body
  %out = f32[10,8]{1,0} get-tuple-element(%loop), index=1
  %alone = f32[10,8]{1,0} all-gather(%out), replica_groups={{0}}, dimensions={0}
  ROOT %gathered = f32[10,16]{1,0} all-gather(%out), replica_groups={{0,1},{2,3}}, dimensions={1}
}
"""


def test_what_loops_do_counts_as_often_as_they_run():
    program = Program(LOOP)
    summed, gathered = program.collectives()
    assert (summed.kind, summed.times, summed.payload, summed.group_size) == ('all-reduce', 10, 32, 4)
    assert summed.sent == 10 * 32 * 2 * 3 / 4
    assert (gathered.kind, gathered.times, gathered.payload, gathered.group_size) == ('all-gather', 1, 640, 2)
    assert program.cycles() == 70
    # A turn reads a row and its number, fast memory (S(1)) aside; two gathers read 320 bytes and write 320 and 640.
    assert program.traffic() == 10 * (32 + 4) + (320 + 320) + (320 + 640)
    assert program.largest_arrays(1)[0][:2] == (640, 'f32[10,16]')


@pytest.mark.parametrize(
    ('groups', 'size'),
    [
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        # Devices in an order of their own.
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}", 2),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ('[4,2]<=[2,2,2]T(2,0,1)', 2),
        ('{{0,1,2},{3,4,5}}', 3),
    ],
)
def test_every_way_to_write_the_devices_that_speak_with_each_other(groups, size):
    program = Program(LOOP.replace('[2,4]<=[8]', groups))
    assert program.collectives()[0].group_size == size


def test_an_unknown_way_is_not_passed_over():
    with pytest.raises(ValueError, match='replica groups'):
        Program(LOOP.replace('[2,4]<=[8]', 'everyone')).collectives()


# A scan of 8 layers of tanh(x w) as libtpu writes it, forwards: a layer's weights are cut from the stack in a fusion in
# the fusion, and what is kept for the backward pass is put into stacks, of which one lies in a v4's S(3).
STACK = """HloModule stack

%cut (p0: bf16[8,64,64], p1: s32[]) -> bf16[64,64] {
  %p0 = bf16[8,64,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,64,64]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %view = bf16[64,64]{1,0} bitcast(%slice)
}

%layer (q0: bf16[8,96,64], q1: s32[], q2: bf16[8,96,64], q3: bf16[96,64], q4: bf16[8,64,64]) -> (bf16[8,96,64], bf16[8,96,64], bf16[96,64]) {
  %q0 = bf16[8,96,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  %q2 = bf16[8,96,64]{2,1,0:T(8,128)(2,1)S(3)} parameter(2)
  %q3 = bf16[96,64]{1,0:T(8,128)(2,1)S(3)} parameter(3)
  %q4 = bf16[8,64,64]{2,1,0:T(8,128)(2,1)} parameter(4)
  %w = bf16[64,64]{1,0} fusion(%q4, %q1), kind=kLoop, calls=%cut
  %y = bf16[96,64]{1,0} convolution(%q3, %w), dim_labels=bf_io->bf
  %one = bf16[1,96,64]{2,1,0} bitcast(%y)
  %none = s32[] constant(0)
  %kept = bf16[8,96,64]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%q0, %one, %q1, %none, %none)
  %near = bf16[8,96,64]{2,1,0:T(8,128)(2,1)S(3)} dynamic-update-slice(%q2, %one, %q1, %none, %none)
  ROOT %all = (bf16[8,96,64]{2,1,0}, bf16[8,96,64]{2,1,0:S(3)}, bf16[96,64]{1,0:S(3)}) tuple(%kept, %near, %y)
}

%condition (c: (s32[])) -> pred[] {
  %c = (s32[], bf16[96,64], bf16[8,96,64], bf16[8,96,64], bf16[8,64,64]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(8)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (d: (s32[])) -> (s32[]) {
  %d = (s32[], bf16[96,64], bf16[8,96,64], bf16[8,96,64], bf16[8,64,64]) parameter(0)
  %j = s32[]{:T(128)S(6)} get-tuple-element(%d), index=0
  %x = bf16[96,64]{1,0:T(8,128)(2,1)S(3)} get-tuple-element(%d), index=1
  %far = bf16[8,96,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%d), index=2
  %close = bf16[8,96,64]{2,1,0:T(8,128)(2,1)S(3)} get-tuple-element(%d), index=3
  %weights = bf16[8,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%d), index=4
  %copied = bf16[96,64]{1,0:T(8,128)(2,1)S(3)} copy(%x)
  %out = (bf16[8,96,64]{2,1,0:T(8,128)(2,1)}, bf16[8,96,64]{2,1,0:T(8,128)(2,1)S(3)}, bf16[96,64]{1,0:S(3)}) fusion(%far, %j, %close, %copied, %weights), kind=kOutput, calls=%layer
  ROOT %next = (s32[]) tuple(%j)
}

ENTRY %main (w: bf16[8,64,64]) -> bf16[8,96,64] {
  %w.1 = bf16[8,64,64]{2,1,0} parameter(0)
  %room = bf16[8,96,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %in = (s32[]) tuple(%w.1)
  ROOT %loop = (s32[]) while(%in), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_scan_of_layers_reads_and_writes_its_stacks_a_layer_at_a_time():
    program = Program(STACK)
    weights, activations = 2 * 64 * 64, 2 * 96 * 64
    assert program.traffic() == 8 * (weights + activations)
    # The copy reads and writes x, the layer reads it once more and writes y twice: into the stack, and for the next.
    assert program.traffic(ON_CHIP) == 8 * 5 * activations


def test_what_is_not_updated_in_place_is_written_whole():
    """A stack that begins as zeros in the same fusion."""
    zeros = 'bf16[8,96,64]{2,1,0} broadcast(%none), dimensions={}'
    begun = STACK.replace(
        '  %kept = bf16[8,96,64]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%q0,',
        f'  %zeros = {zeros}\n  %kept = bf16[8,96,64]{{2,1,0:T(8,128)(2,1)}} dynamic-update-slice(%zeros,',
    )
    assert begun != STACK
    assert Program(begun).traffic() == 8 * (2 * 64 * 64 + 8 * 2 * 96 * 64)


def test_flops_of_loops_and_recomputation():
    w = jnp.ones((5, 8, 8))

    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0].sum()

    x = jnp.ones((4, 8))
    product = 2 * 4 * 8 * 8
    assert flops(jax.make_jaxpr(loss)(w, x)) == 5 * product
    # Forward, once more for the backward pass, and a product for each of the two gradients.
    assert flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(w, x)) == pytest.approx(4 * 5 * product)


def test_flops_inside_of_kernels():
    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] @ y_ref[...]

    def step(x, y, cost=None):
        block = pl.BlockSpec((4, 8), lambda i: (i, 0))
        whole = pl.BlockSpec((8, 8), lambda i: (0, 0))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        specs = {'grid': (3,), 'in_specs': [block, whole], 'out_specs': block, 'out_shape': shape}
        call = pl.pallas_call(kernel, **specs, cost_estimate=cost)
        return jax.lax.scan(lambda x, _: (call(x, y), None), x, None, length=5)[0] @ y

    jaxpr = jax.make_jaxpr(step)(jnp.ones((12, 8)), jnp.ones((8, 8)))
    product = 2 * 12 * 8 * 8
    assert flops(jaxpr) == 6 * product
    assert flops(jaxpr, custom_kernels_only=True) == 5 * product
    # A kernel that passes over something says what is left.
    cost = pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0)
    jaxpr = jax.make_jaxpr(functools.partial(step, cost=cost))(jnp.ones((12, 8)), jnp.ones((8, 8)))
    assert flops(jaxpr, custom_kernels_only=True) == 5 * 7


def test_kernels_of_pallas_have_bytes_and_no_cycles():
    config = 'backend_config={"custom_call_config":{"body":"TUz"}}'
    call = f'%row = f32[1,8]{{1,0}} custom-call(%x, %j), custom_call_target="tpu_custom_call", {config}'
    lines = [call if ' fusion(%x, %j)' in line else line for line in LOOP.splitlines()]
    program = Program('\n'.join(lines).replace(call, '  ' + call))
    assert program.cycles() is None, 'there is no other kernel'
    assert program.custom_kernel_traffic() == 10 * (320 + 4 + 32)


def test_a_compiled_scan_is_read_back():
    def step(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    w, x = jnp.ones((7, 64, 64)), jnp.ones((32, 64))
    program = Program(jax.jit(step).lower(x, w).compile().as_text())
    assert program.collectives() == []
    # Seven times at least: a matrix read, and x read and written.
    assert program.traffic() > 7 * 4 * (64 * 64 + 2 * 32 * 64)


def test_a_kernel_without_an_estimate_leaves_the_whole_without():
    assert Program(LOOP.replace('"7"', f'"{2**63 - 1}"')).cycles() is None
