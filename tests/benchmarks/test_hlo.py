"""The reader of compiled programs, on programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest

from gau.benchmarks.hlo import Program
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
    assert program.memory_traffic() == 10 * (32 + 4) + (320 + 320) + (320 + 640)
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


def test_flops_of_loops_and_recomputation():
    w = jnp.ones((5, 8, 8))

    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0].sum()

    x = jnp.ones((4, 8))
    product = 2 * 4 * 8 * 8
    assert flops(jax.make_jaxpr(loss)(w, x)) == 5 * product
    # Forward, once more for the backward pass, and a product for each of the two gradients.
    assert flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(w, x)) == pytest.approx(4 * 5 * product)


def test_a_compiled_scan_is_read_back():
    def step(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    w, x = jnp.ones((7, 64, 64)), jnp.ones((32, 64))
    program = Program(jax.jit(step).lower(x, w).compile().as_text())
    assert program.collectives() == []
    # Seven times at least: a matrix read, and x read and written.
    assert program.memory_traffic() > 7 * 4 * (64 * 64 + 2 * 32 * 64)


def test_a_kernel_without_an_estimate_leaves_the_whole_without():
    assert Program(LOOP.replace('"7"', f'"{2**63 - 1}"')).cycles() is None
