"""Pallas kernels of `gau.ops.kernels.tpu_gated_chunks`, each as what one step of the grid does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import pallas


class Step(NamedTuple):
    """One step of a grid [B, G, blocks of E]: its arrays in the chip's memory, by name, and where it stands.

    Attributes:
      refs: the blocks of inputs and outputs, and the scratch, which lives as long as the grid; with a window of two
        chunks `passed` among it.
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

    def values(self, dtype: Any) -> tuple[Array, Array]:
        """Returns silu(v) of the chunk and of that which the keys belong to, in a window of two the one before."""
        v = self.silu('pv')[0].astype(dtype)
        if 'passed' not in self:
            return v, v
        # Without a halo the weights on what is before the first chunk are zeros, and so are its keys.
        return v, self.pass_on(v, self.silu('halo')[0].astype(dtype) if 'halo' in self else v)

    def pass_on(self, x: Array, first: Array) -> Array:
        """Passes x [C, BE] on to the next chunk of the scan; returns what this one was passed, `first` if the first."""
        passed = self.refs['passed']
        before = jnp.where(self.first_chunk, first, passed[self.block])
        passed[self.block] = x.astype(passed.dtype)
        return before

    def carry_on(self, state: Array) -> None:
        """Keeps a state for the next chunk, or leaves it after the last one."""
        self.refs['state'][self.block] = state
        if 'left' in self:
            self.store_at_last_chunk('left', state)

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

    def store_at_last_chunk(self, name: str, x: Array) -> None:
        """Writes a block where it comes once, at the last chunk of the scan."""
        from jax.experimental import pallas as pl

        @pl.when(self.last_chunk)
        def _():
            self.store(name, x)

    def store(self, name: str, x: Array) -> None:
        """Writes a block."""
        ref = self.refs[name]
        ref[...] = x.astype(ref.dtype)


def _mixed(step: Step, state: Array, v: Array, before: Array) -> Array:
    """Returns A v + Q M of a block, or Q M alone where there is no A; float32 [C, BE]."""
    mixed = pallas.dot(step.load('q'), state)
    if 'read' in step:
        mixed += step.load('read').astype(jnp.float32)
    if 'a' in step:
        own, other = _weights(step)
        mixed += pallas.dot(own, v)
        if other is not None:
            mixed += pallas.dot(other, before)
    return mixed


def _weights(step: Step) -> tuple[Array, Array | None]:
    """Returns A on the own chunk and, in a window of two, on the one before, [C, C] each."""
    a = step.load('a')
    return (a[:, len(a) :], a[:, : len(a)]) if 'passed' in step else (a, None)


def output_kernel(step: Step, dtype: Any) -> None:
    """o = u (A v + Q M); without A what one scan adds to the values."""
    (v, before), state = step.values(dtype), step.state()
    mixed = _mixed(step, (step.scale * state).astype(dtype), v, before)
    step.store('o', step.silu('pu')[0] * mixed if 'a' in step else mixed)
    step.carry_on(step.carry * state + pallas.dot(step.load('k'), before, 'ji,jk'))


def query_gradient_kernel(step: Step, dtype: Any) -> None:
    """Gradients of u and A, and of the queries of one scan; the states are made again, and may be written."""
    (u, du), (v, before) = step.silu('pu'), step.values(dtype)
    do, state = step.load('do').astype(jnp.float32), step.state()
    scaled, dmixed = (step.scale * state).astype(dtype), (do * u).astype(dtype)
    step.add('dq', pallas.dot(dmixed, scaled, 'ij,kj'))
    if 'states' in step:
        step.store('states', state)
    if 'a' in step:
        dpu = do * _mixed(step, scaled, v, before) * du
        step.store('dpu', dpu)
        step.add_over_chunks('dbias', dpu)
        da = [pallas.dot(dmixed, x, 'ij,kj') for x in ([before, v] if 'passed' in step else [v])]
        step.add('da', jnp.concatenate(da, axis=1))
    step.carry_on(step.carry * state + pallas.dot(step.load('k'), before, 'ji,jk'))


def value_gradient_kernel(step: Step, dtype: Any) -> None:
    """Gradients of v and of the keys of one scan, whose chunks come in the other order, with the state's gradient.

    In a window of two chunks the keys belong to the values before, whose gradient is passed on to their chunk.
    """
    (v, dsilu), u = step.silu('pv'), step.silu('pu')[0]
    dmixed, dstate = (step.load('do').astype(jnp.float32) * u).astype(dtype), step.state()
    before, dsilu_before = step.silu('before') if 'before' in step else (v, dsilu)
    if 'halo' in step:
        halo = step.silu('halo')
        before, dsilu_before = (
            jnp.where(step.last_chunk, x, y) for x, y in zip(halo, (before, dsilu_before), strict=True)
        )
    step.add('dk', pallas.dot(before.astype(dtype), dstate.astype(dtype), 'ij,kj'))
    if 'states' in step:
        # What is carried on: the state before the chunk, by its factor.
        step.add('dcarry', (step.load('states') * dstate).sum(axis=1, keepdims=True))
    dv = pallas.dot(step.load('k'), dstate.astype(dtype))
    if 'read' in step:
        dv += step.load('read').astype(jnp.float32)
    if 'a' in step:
        own, other = _weights(step)
        if other is not None:
            dbefore = dv + pallas.dot(other, dmixed, 'ji,jk')
            if 'dhalo' in step:
                step.store_at_last_chunk('dhalo', dbefore * dsilu_before)
            dv = step.pass_on(dbefore, jnp.zeros_like(dbefore))
        dpv = (dv + pallas.dot(own, dmixed, 'ji,jk')) * dsilu
        step.store('dpv', dpv)
        step.add_over_chunks('dbias', dpv)
    else:
        step.store('dv', dv)
    step.carry_on(step.carry * dstate + step.scale * pallas.dot(step.load('q'), dmixed, 'ji,jk'))


def state_kernel(step: Step, dtype: Any) -> None:
    """The state that the chunks leave."""
    _, before = step.values(dtype)
    step.carry_on(step.carry * step.state() + pallas.dot(step.load('k'), before, 'ji,jk'))


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
