"""The gated chunk matmul on a TPU, in Pallas: the operation with its own gradient, its kernels and their order.

    o[g] = silu(U[g]) * (A[g] v[g] + Q[g] M[g])      v = silu(V)

A TPU runs a kernel's grid in order: the chunks of a sequence come one after the other, and the state M stays in memory
on the chip from one to the next. No state is saved, and the backward pass makes them again on its way; it writes them
to main memory only where the factors by which they are carried on have a gradient. What it gets saved are the operands
and, if not causal, what the reverse scan added to the values.

In a window of two chunks the weights A are on the chunk before as well, and chunk g reads the state M[g - 1]. That is
the scan of before over keys, values and factors that are all a chunk late: keys and factors are shifted here, and the
values, which are wide, stay in memory on the chip from one chunk to the next.

Where the chunks of a sequence are spread over devices: `gau.ops.kernels.sequence_shards`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.gated_states import previous_chunk
from gau.ops.kernels import pallas
from gau.ops.kernels.sequence_shards import Shards, states_of_other_shards
from gau.ops.kernels.tpu_gated_chunks_pallas import (
    MATMULS,
    Step,
    output_kernel,
    query_gradient_kernel,
    state_gradient_kernel,
    state_kernel,
    value_gradient_kernel,
)

# Columns of E that a step of the grid has: the first of these that divides E and with which a block [C, BE] has no more
# numbers than the 16 MiB of a v4's vector memory allow for; all of E where none does, which only the interpreter takes.
BLOCKS = (512, 384, 256, 128)
BLOCK_NUMBERS = 256 * 512


def gated_chunk_matmul(
    p_BGCW: Array,
    bias_2E: Array,
    a_BGCM: Array,
    q_BGCF: Array,
    k_BGCF: Array,
    carry_mask_BGK: Array,
    state_scale_BGJ: Array,
    causal: bool,
    shards: Shards | None = None,
    sequence_axis: str | None = None,
) -> Array:
    """Returns silu(u) * (a silu(v) + q state_scale m), [B, G, C, E]: see `gau.ops.kernels.gated_chunks`.

    Any weights `a` will do that are 0 on what is before the first chunk; `causal` says nothing new here, for J does.
    `shards` is given where this runs inside `jax.shard_map` with the chunks in order over the devices of the mesh axis
    `sequence_axis`; in a window of two it is that of carry masks a chunk late. Factors for each row of the states,
    K = F, are for causal calls; `shards` are then made of factors that all rows have in common.
    """
    del causal
    halo_BCE = None
    if a_BGCM.shape[-1] > a_BGCM.shape[-2]:
        by_chunk = k_BGCF, carry_mask_BGK, state_scale_BGJ
        k_BGCF, carry_mask_BGK, state_scale_BGJ = (previous_chunk(x, sequence_axis) for x in by_chunk)
        if sequence_axis is not None:
            e = bias_width(bias_2E)
            halo_BCE = previous_chunk(p_BGCW[:, -1:, :, e : 2 * e], sequence_axis)[:, 0]
    arrays = p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGK, state_scale_BGJ
    return _gated_chunk_matmul(*arrays, halo_BCE, shards, sequence_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(9,))
def _gated_chunk_matmul(
    p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGK, state_scale_BGJ, halo_BCE, shards, sequence_axis
):
    """The same, keys and factors as the scan has them; `halo_BCE`: projections of the values before the first chunk."""
    arrays = p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGK, state_scale_BGJ
    return _forward(*arrays, halo_BCE, shards, sequence_axis)[0]


def _forward(p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGK, state_scale_BGJ, halo_BCE, shards, sequence_axis):
    arrays = p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGK, state_scale_BGJ, halo_BCE
    call = _Call.of(*arrays)
    begins = [None] * call.directions
    if shards is not None:
        left = [call(state_kernel, ('pv', 'bias', 'k'), ('left',), scan=scan)[0] for scan in range(call.directions)]
        begins = states_of_other_shards(left, shards.begin_BJA, sequence_axis)
    read_BGCE = None
    if call.directions == 2:
        read_BGCE = call(output_kernel, ('pv', 'bias', 'q', 'k'), ('o',), scan=1, begin=begins[1])[0]
    operands = ('pu', 'pv', 'bias', 'a', 'q', 'k')
    o_BGCE = call(output_kernel, operands, ('o',), read=read_BGCE, begin=begins[0])[0]
    return o_BGCE, (*arrays, shards, read_BGCE, begins)


def _backward(sequence_axis, residuals, do_BGCE):
    *arrays, shards, read_BGCE, begins = residuals
    bias_2E, halo_BCE = arrays[1], arrays[7]
    call = _Call.of(*arrays, do_BGCE)
    dbegins = [None] * call.directions
    if shards is not None:
        operands = ('pu', 'bias', 'q', 'do')
        left = [
            call(state_gradient_kernel, operands, ('left',), scan=scan, against=True)[0]
            for scan in range(call.directions)
        ]
        dbegins = states_of_other_shards(left, shards.leave_BJA, sequence_axis)
    operands = ('pu', 'pv', 'bias', 'a', 'q', 'k', 'do')
    # The gradient of the factors for rows takes states and their gradients, which come in opposite orders.
    more = ('states',) if call.carry is None else ()
    results = ('dpu', 'dbias', 'da', 'dq', *more)
    dp, dbias_u, da_BGCM, dq, *states = call(query_gradient_kernel, operands, results, read=read_BGCE, begin=begins[0])
    dqs, dks, dv = [dq], [], None
    if call.directions == 2:
        part = ('pu', 'pv', 'bias', 'q', 'k', 'do')
        dqs += call(query_gradient_kernel, part, ('dq',), scan=1, begin=begins[1])
        dv, dk = call(value_gradient_kernel, part, ('dv', 'dk'), scan=1, against=True, begin=dbegins[1])
        dks = [dk]
    fields = {'read': dv, 'against': True, 'dp': dp, 'begin': dbegins[0], 'states': states[0] if states else None}
    inputs = (*operands, 'before') if call.window > 1 else operands
    results = ('dpv', 'dbias', 'dk', *(('dcarry',) if states else ()), *(('dhalo',) if halo_BCE is not None else ()))
    dp, dbias_v, dk, *rest = call(value_gradient_kernel, inputs, results, **fields)
    dq_BGCF, dk_BGCF = jnp.concatenate(dqs, axis=-1), jnp.concatenate([dk, *dks], axis=-1)
    columns = 2 * bias_width(bias_2E)
    if dp.shape[-1] > columns:
        # Of another reader, and not written.
        dp = jnp.pad(dp[..., :columns], [(0, 0)] * 3 + [(0, dp.shape[-1] - columns)])
    dbias_2E = jnp.stack([dbias_u.sum(0), dbias_v.sum(0)]).reshape(bias_2E.shape)
    dcarry_BGK, dscale_BGJ, dhalo_BCE, dshards = jax.tree.map(jnp.zeros_like, (*arrays[5:], shards))
    if halo_BCE is not None:
        *rest, dhalo_BCE = rest
        dbias_2E = dbias_2E.at[1].add(dhalo_BCE.astype(jnp.float32).sum((0, 1)))
    if rest:
        dcarry_BGK = rest[0].reshape(dcarry_BGK.shape).astype(dcarry_BGK.dtype)
    dbias_2E = dbias_2E.astype(bias_2E.dtype)
    return dp, dbias_2E, da_BGCM, dq_BGCF, dk_BGCF, dcarry_BGK, dscale_BGJ, dhalo_BCE, dshards


_gated_chunk_matmul.defvjp(_forward, _backward)


def bias_width(bias_2E: Array) -> int:
    """Returns E."""
    return bias_2E.shape[-1]


class _Call(NamedTuple):
    """The operands of one call, by their names in kernels, and their sizes.

    `carry` is None where the states' rows have a factor each, which is then an operand; `window` are the chunks that
    weights are on, 1 or 2.
    """

    arrays: dict[str, Array]
    scale: Array
    carry: Array | None
    batch: int
    groups: int
    size: int
    width: int
    columns: int
    window: int
    directions: int
    block: int

    @classmethod
    def of(
        cls,
        p_BGCW: Array,
        bias_2E: Array,
        a_BGCM: Array,
        q_BGCF: Array,
        k_BGCF: Array,
        carry_mask_BGK: Array,
        state_scale_BGJ: Array,
        halo_BCE: Array | None,
        do_BGCE: Array | None = None,
    ) -> '_Call':
        batch, groups, size, columns = p_BGCW.shape
        width = bias_width(bias_2E)
        fit = (block for block in BLOCKS if width % block == 0 and block * size <= BLOCK_NUMBERS)
        block = next(fit, width)
        # [1, BE] are whole dimensions, as the blocks of a TPU's kernel must be, or multiples of a tile.
        bias = bias_2E.astype(jnp.float32).reshape(2, width // block, 1, block)
        arrays = {'pu': p_BGCW, 'pv': p_BGCW, 'before': p_BGCW, 'bias': bias, 'halo': halo_BCE}
        arrays |= {'a': a_BGCM, 'q': q_BGCF, 'k': k_BGCF, 'do': do_BGCE}
        # Scalars of chunks in one row: a second dimension would be padded to 128.
        scale, carry = (x.astype(jnp.float32).reshape(-1) for x in (state_scale_BGJ, carry_mask_BGK))
        directions = state_scale_BGJ.shape[-1]
        if carry_mask_BGK.shape[-1] > directions:
            arrays['carry'], carry = carry.reshape(*carry_mask_BGK.shape, 1), None
        window = a_BGCM.shape[-1] // size
        return cls(arrays, scale, carry, batch, groups, size, width, columns, window, directions, block)

    def __call__(
        self,
        kernel: Callable[[Step, Any], None],
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        scan: int = 0,
        against: bool = False,
        read: Array | None = None,
        begin: Array | None = None,
        dp: Array | None = None,
        states: Array | None = None,
    ) -> list[Array]:
        """Runs a kernel and returns its outputs.

        Args:
          kernel: of `gau.ops.kernels.tpu_gated_chunks_pallas`.
          inputs: names of operands.
          outputs: names of results.
          scan: 0 for the forward scan, 1 for the reverse one.
          against: whether the chunks come in the other order than the scan's.
          read: one more operand [B, G, C, E], or None.
          begin: the state of the first chunk, float32 [B, S, E]; None: zeros.
          dp: the gradient of p with what was written before, to be written on; or None.
          states: one more operand [B, G, S, E], or None.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        reverse, blocks = (scan == 1) != against, self.width // self.block
        has_values = 'pv' in inputs
        more = {'read': read, 'begin': begin, 'states': states, 'carry': self.arrays.get('carry')}
        more['halo'] = self.arrays['halo'] if has_values else None
        more = {name: x for name, x in more.items() if x is not None}
        scalars = [self.scale] if self.carry is None else [self.scale, self.carry]
        given = [*(self.arrays[name] for name in inputs), *more.values()]
        names = [*inputs, *more]
        dtype, width = self.arrays['pu'].dtype, self.arrays['q'].shape[-1] // self.directions
        results = {name: self._result(name, width) for name in outputs}
        scratch = {'state': (blocks, width, self.block)}
        sums = {'da': self.arrays['a'].shape[2:], 'dcarry': (width, 1)}
        sums |= dict.fromkeys(('dq', 'dk'), (self.size, width))
        scratch |= {f'{name}_sum': sums[name] for name in outputs if name in sums}
        scratch = {name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch.items()}
        if self.window > 1 and has_values:
            scratch['passed'] = pltpu.VMEM((blocks, self.size, self.block), dtype)
        aliases = {}
        in_specs = [self._spec(name, reverse) for name in names]
        if dp is not None:
            aliases = {len(scalars) + len(given): 0}
            given, names = [*given, dp], [*names, 'dp']
            in_specs.append(pl.BlockSpec(memory_space=pl.ANY))

        def run(scale_ref, *refs):
            scalar_refs, refs = refs[: len(scalars) - 1], refs[len(scalars) - 1 :]
            chunk, block = pl.program_id(1), pl.program_id(2)
            group = self.groups - 1 - chunk if reverse else chunk
            at = (pl.program_id(0) * self.groups + group) * self.directions + scan
            arrays = dict(zip((*names, *outputs, *scratch), refs, strict=True))
            ends = chunk == 0, chunk == self.groups - 1, block == 0, block == blocks - 1
            carry = arrays['carry'][...] if 'carry' in arrays else scalar_refs[0][at]
            kernel(Step(arrays, carry, scale_ref[at], scan, block, *ends), dtype)

        call = pl.pallas_call(
            run,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(self.batch, self.groups, blocks),
                in_specs=in_specs,
                out_specs=[self._spec(name, reverse) for name in outputs],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=list(results.values()),
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
            cost_estimate=self._cost(kernel, 'a' in names, names, results),
            interpret=pallas.interpreted(),
            name=kernel.__name__ + ('_of_reverse_scan' if scan else ''),
        )
        return call(*scalars, *given)

    def _spec(self, name: str, reverse: bool) -> Any:
        from jax.experimental import pallas as pl

        def group(g):
            return self.groups - 1 - g if reverse else g

        blocks = self.width // self.block
        if name == 'bias':
            return pl.BlockSpec((2, None, 1, self.block), lambda b, g, e, *_: (0, e, 0, 0))
        if name == 'dbias':
            return pl.BlockSpec((None, blocks, 1, self.block), lambda b, g, e, *_: (b, 0, 0, 0))
        width = self.arrays['q'].shape[-1] // self.directions
        if name in ('carry', 'dcarry'):
            return pl.BlockSpec((None, None, width, 1), lambda b, g, e, *_: (b, group(g), 0, 0))
        if name == 'states':
            return pl.BlockSpec((None, None, width, self.block), lambda b, g, e, *_: (b, group(g), 0, e))
        if name in ('begin', 'left', 'halo', 'dhalo'):
            # Read at the first chunk or written at the last, where every block comes once. The halo is beside chunk 0.
            first = name == 'begin' or (name == 'halo' and not reverse)
            held, other = (0, blocks - 1) if first else (self.groups - 1, 0)
            rows = width if name in ('begin', 'left') else self.size
            return pl.BlockSpec((None, rows, self.block), lambda b, g, e, *_: (b, 0, jnp.where(g == held, e, other)))
        if name in ('a', 'da', 'q', 'k', 'dq', 'dk'):
            inner = self.arrays['a' if name in ('a', 'da') else 'q'].shape[-1]
            inner = inner // self.directions if name in ('dq', 'dk') else inner
            return pl.BlockSpec((None, None, self.size, inner), lambda b, g, e, *_: (b, group(g), 0, 0))
        if name == 'before':
            # Of the first chunk any values will do.
            block = None, None, self.size, self.block
            return pl.BlockSpec(block, lambda b, g, e, *_: (b, jnp.maximum(group(g) - 1, 0), 0, blocks + e))
        first = blocks if name in ('pv', 'dpv') else 0
        return pl.BlockSpec((None, None, self.size, self.block), lambda b, g, e, *_: (b, group(g), 0, first + e))

    def _result(self, name: str, width: int) -> jax.ShapeDtypeStruct:
        dtype = self.arrays['pu'].dtype
        if name == 'dbias':
            return jax.ShapeDtypeStruct((self.batch, self.width // self.block, 1, self.block), jnp.float32)
        if name == 'left':
            return jax.ShapeDtypeStruct((self.batch, width, self.width), jnp.float32)
        if name == 'dhalo':
            return jax.ShapeDtypeStruct((self.batch, self.size, self.width), dtype)
        if name in ('states', 'dcarry'):
            columns, dtype = (self.width, dtype) if name == 'states' else (1, jnp.float32)
            return jax.ShapeDtypeStruct((self.batch, self.groups, width, columns), dtype)
        columns = {'dpu': self.columns, 'dpv': self.columns, 'da': self.window * self.size, 'dq': width, 'dk': width}
        return jax.ShapeDtypeStruct((self.batch, self.groups, self.size, columns.get(name, self.width)), dtype)

    def _cost(self, kernel: Callable, whole: bool, names: Sequence[str], results: dict[str, Any]) -> Any:
        """Returns what the compiler is told: it sees into no kernel."""
        from jax.experimental import pallas as pl

        squares, states = MATMULS[kernel][0 if whole else 1]
        tokens, width = self.batch * self.groups * self.size, self.arrays['q'].shape[-1] // self.directions
        weights = self.window * self.size
        inner = squares * weights + states * width
        wide = 'pu', 'pv', 'before', 'do', 'read', 'o', 'dpu', 'dpv', 'dv'
        by_column = sum(name in wide for name in (*names, *results))
        narrow = weights * ('a' in names) + self.arrays['q'].shape[-1] * 2
        narrow += sum({'da': weights, 'dq': width, 'dk': width}.get(name, 0) for name in results)
        narrow += width * self.width // self.size * ('states' in names or 'states' in results)
        itemsize = self.arrays['pu'].dtype.itemsize
        return pl.CostEstimate(
            flops=2 * tokens * self.width * inner,
            transcendentals=tokens * self.width * sum(name in ('pu', 'pv', 'before') for name in names),
            bytes_accessed=tokens * itemsize * (by_column * self.width + narrow),
        )
