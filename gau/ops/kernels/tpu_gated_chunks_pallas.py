"""Pallas kernels of `gau.ops.kernels.tpu_gated_chunks`, each as what one step of the grid does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import pallas


class Step(NamedTuple):
    """One step of a grid [B, G, blocks of E]: its arrays in the chip's memory, by name, and where it stands.

    Attributes:
      refs: the blocks of inputs and outputs, and the scratch, which lives as long as the grid.
      carry: factor by which the scan carries its state on over the chunk: 1, a decay, or 0; or [S, 1], for each row.
      scale: state scale of the chunk.
      scan: which columns of q and k the scan has.
      block: of E.
      first_chunk: whether the chunk is the first that the scan comes to.
      last_chunk: whether it is the last one.
      first_block: whether this is the first block of E of the chunk.
      last_block: whether it is the last one.
    """

    refs: dict[str, Any]
    carry: Array
    scale: Array
    scan: int
    block: Array
    first_chunk: Array
    last_chunk: Array
    first_block: Array
    last_block: Array

    def __contains__(self, name: str) -> bool:
        """Whether the kernel has an array of this name."""
        return name in self.refs

    def load(self, name: str) -> Array:
        """Returns a block; of queries and keys the columns of the scan."""
        x = self.refs[name][...]
        if name in ('q', 'k'):
            width = self.refs['state'].shape[1]
            return x[:, self.scan * width : (self.scan + 1) * width]
        return x

    def silu(self, name: str) -> tuple[Array, Array]:
        """Returns silu(p + bias) of the gate's or the values' projections and its derivative, float32 [C, BE]."""
        x = self.load(name).astype(jnp.float32) + self.refs['bias'][0 if name == 'pu' else 1]
        sigmoid = jax.nn.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))

    def state(self) -> Array:
        """Returns what is carried to the chunk, float32 [S, BE]; for the first zeros, or what was given to begin."""
        begin = self.load('begin') if 'begin' in self else 0.0
        return jnp.where(self.first_chunk, begin, self.refs['state'][self.block])

    def carry_on(self, state: Array) -> None:
        """Keeps a state for the next chunk, or leaves it after the last one."""
        from jax.experimental import pallas as pl

        self.refs['state'][self.block] = state
        if 'left' in self:

            @pl.when(self.last_chunk)
            def _():
                self.store('left', state)

    def add(self, name: str, x: Array) -> None:
        """Adds to a gradient that is summed over the blocks of E, and writes it after the last one."""
        from jax.experimental import pallas as pl

        total = self.refs[f'{name}_sum']
        total[...] = jnp.where(self.first_block, x, total[...] + x)

        @pl.when(self.last_block)
        def _():
            self.store(name, total[...])

    def add_over_chunks(self, name: str, x: Array) -> None:
        """Adds the sum over tokens of x [C, BE] to that of the chunks before."""
        total, x = self.refs[name], x.sum(axis=0, keepdims=True)
        total[self.block] = jnp.where(self.first_chunk, x, total[self.block] + x)

    def store(self, name: str, x: Array) -> None:
        """Writes a block."""
        ref = self.refs[name]
        ref[...] = x.astype(ref.dtype)


def _mixed(step: Step, state: Array, v: Array) -> Array:
    """Returns A v + Q M of a block, or Q M alone where there is no A; float32 [C, BE]."""
    mixed = pallas.dot(step.load('q'), state)
    if 'read' in step:
        mixed += step.load('read').astype(jnp.float32)
    return mixed + pallas.dot(step.load('a'), v) if 'a' in step else mixed


def output_kernel(step: Step, dtype: Any) -> None:
    """o = u (A v + Q M); without A what one scan adds to the values."""
    v, state = step.silu('pv')[0].astype(dtype), step.state()
    mixed = _mixed(step, (step.scale * state).astype(dtype), v)
    step.store('o', step.silu('pu')[0] * mixed if 'a' in step else mixed)
    step.carry_on(step.carry * state + pallas.dot(step.load('k'), v, 'ji,jk'))


def query_gradient_kernel(step: Step, dtype: Any) -> None:
    """Gradients of u and A, and of the queries of one scan; the states are made again, and may be written."""
    (u, du), v = step.silu('pu'), step.silu('pv')[0].astype(dtype)
    do, state = step.load('do').astype(jnp.float32), step.state()
    scaled, dmixed = (step.scale * state).astype(dtype), (do * u).astype(dtype)
    step.add('dq', pallas.dot(dmixed, scaled, 'ij,kj'))
    if 'states' in step:
        step.store('states', state)
    if 'a' in step:
        dpu = do * _mixed(step, scaled, v) * du
        step.store('dpu', dpu)
        step.add_over_chunks('dbias', dpu)
        step.add('da', pallas.dot(dmixed, v, 'ij,kj'))
    step.carry_on(step.carry * state + pallas.dot(step.load('k'), v, 'ji,jk'))


def value_gradient_kernel(step: Step, dtype: Any) -> None:
    """Gradients of v and of the keys of one scan, whose chunks come in the other order, with the state's gradient."""
    (v, dsilu), u = step.silu('pv'), step.silu('pu')[0]
    dmixed, dstate = (step.load('do').astype(jnp.float32) * u).astype(dtype), step.state()
    step.add('dk', pallas.dot(v.astype(dtype), dstate.astype(dtype), 'ij,kj'))
    if 'states' in step:
        # What is carried on: the state before the chunk, by its factor.
        step.add('dcarry', (step.load('states') * dstate).sum(axis=1, keepdims=True))
    dv = pallas.dot(step.load('k'), dstate.astype(dtype))
    if 'read' in step:
        dv += step.load('read').astype(jnp.float32)
    if 'a' in step:
        dpv = (dv + pallas.dot(step.load('a'), dmixed, 'ji,jk')) * dsilu
        step.store('dpv', dpv)
        step.add_over_chunks('dbias', dpv)
    else:
        step.store('dv', dv)
    step.carry_on(step.carry * dstate + step.scale * pallas.dot(step.load('q'), dmixed, 'ji,jk'))


def state_kernel(step: Step, dtype: Any) -> None:
    """The state that the chunks leave."""
    v = step.silu('pv')[0].astype(dtype)
    step.carry_on(step.carry * step.state() + pallas.dot(step.load('k'), v, 'ji,jk'))


def state_gradient_kernel(step: Step, dtype: Any) -> None:
    """The gradient of the state with which the chunks begin."""
    dmixed = (step.load('do').astype(jnp.float32) * step.silu('pu')[0]).astype(dtype)
    step.carry_on(step.carry * step.state() + step.scale * pallas.dot(step.load('q'), dmixed, 'ji,jk'))


# Matmuls of a kernel: with [C, C] weights, and with [S, E] states, in a whole one and in one of a second scan.
MATMULS = {
    output_kernel: ((1, 2), (0, 2)),
    query_gradient_kernel: ((2, 3), (0, 2)),
    value_gradient_kernel: ((1, 3), (0, 3)),
    state_kernel: ((0, 1), (0, 1)),
    state_gradient_kernel: ((0, 1), (0, 1)),
}
