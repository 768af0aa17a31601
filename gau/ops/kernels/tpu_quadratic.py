"""Quadratic attention with relu^2 on a TPU, in Pallas: no more of the weights than a block of T x T exists at once.

    A[i, j] = relu(q[i].k[j] score_scale[i] + b[j - i])^2 weight_scale[i]   where i sees j, else 0        o = A v

A TPU runs a kernel's grid in order: the blocks of keys come one after the other, and the sums over them, [T, E], stay
in memory on the chip. The backward pass makes the weights again, once for the gradients of queries and bias and once
for those of keys and values. A block of the bias is read as a window of its 2 T - 1 distances.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import pallas
from gau.ops.kernels.quadratic_weights import describe_tokens
from gau.ops.masks import clear_padding, document_length
from gau.ops.scores import Scoring
from gau.ops.tracing import traced_once

# T, a power of two: the first of these that is no longer than the sequence and with which a block [T, E] has no more
# numbers than the 16 MiB of a v4's vector memory allow for; else the last one.
BLOCKS = (256, 128)
BLOCK_NUMBERS = 256 * 1536


@traced_once('scoring', 'causal', 'sequence_axis')
def quadratic_attention(
    q_BNS: Array,
    k_BNS: Array,
    v_BNE: Array,
    *,
    scoring: Scoring,
    causal: bool,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
    sequence_axis: str | None = None,
) -> Array:
    """Returns what the reference `gau.ops.quadratic_attention.quadratic_attention` does, for the function relu2.

    With a `sequence_axis`, keys and values of all devices are gathered, as there.
    """
    batch, n, width = q_BNS.shape
    q_BNS, k_BMS, v_BME = (clear_padding(x, segment_ids_BN) for x in (q_BNS, k_BNS, v_BNE))
    ids_BN = jnp.ones((batch, n), jnp.int32) if segment_ids_BN is None else jnp.broadcast_to(segment_ids_BN, (batch, n))
    ids_BM, first = ids_BN, 0
    if sequence_axis is not None:
        gather = functools.partial(jax.lax.all_gather, axis_name=sequence_axis, axis=1, tiled=True)
        k_BMS, v_BME, ids_BM = gather(k_BMS), gather(v_BME), gather(ids_BN)
        first = n * jax.lax.axis_index(sequence_axis)
    m = k_BMS.shape[1]
    length = m if segment_ids_BN is None else document_length(ids_BM)
    ids = None if segment_ids_BN is None else ids_BM
    tokens = describe_tokens(ids, (batch, m), scoring=scoring, causal=causal, sequence_length=length, width=width)
    scales_BN2 = jnp.stack([tokens.score_scale_BN, tokens.weight_scale_BN], axis=-1)
    scales_BN2 = jax.lax.dynamic_slice_in_dim(scales_BN2, first, n, axis=1)

    fit = (t for t in BLOCKS if t * v_BME.shape[-1] <= BLOCK_NUMBERS and t <= n)
    t = next(fit, BLOCKS[-1])
    q_BNS, k_BMS, v_BME, scales_BN2, ids_BN, ids_BM = (
        jnp.pad(x, [(0, 0), (0, -x.shape[1] % t)] + [(0, 0)] * (x.ndim - 2))
        for x in (q_BNS, k_BMS, v_BME, scales_BN2, ids_BN, ids_BM)
    )
    windows = None
    if bias_P is not None:
        windows = _windows(bias_P.astype(jnp.float32), q_BNS.shape[1] // t, k_BMS.shape[1] // t, t, m, first)
    o_BNE = _attend(q_BNS, k_BMS, v_BME, windows, scales_BN2, ids_BN, ids_BM, jnp.asarray(first, jnp.int32), causal, t)
    return clear_padding(o_BNE[:, :n], segment_ids_BN)


def _windows(bias_P: Array, queries: int, keys: int, t: int, m: int, first: int | Array) -> Array:
    """Returns the bias of the distances in each diagonal of blocks, [queries + keys - 1, 2 T].

    Window d is that of the blocks of keys y and of queries x with y - x = d - (queries - 1); its number w is the bias
    of the distance (y - x) T - first + w - (T - 1).
    """
    number = (queries + keys) * t
    # Distance 0 stands at m - 1. What is beyond any token's distance is masked, whatever it is.
    bias_P = jnp.pad(bias_P, (queries * t + m, keys * t + m))
    start = queries * t + m + (m - 1) - first - (queries - 1) * t - (t - 1)
    blocks = jax.lax.dynamic_slice_in_dim(bias_P, start, number).reshape(-1, t)
    return jnp.concatenate([blocks[:-1], blocks[1:]], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _attend(
    q_BNS: Array,
    k_BMS: Array,
    v_BME: Array,
    windows_D2T: Array | None,
    scales_BN2: Array,
    ids_BN: Array,
    ids_BM: Array,
    first: Array,
    causal: bool,
    t: int,
) -> Array:
    """Returns A v, [B, N, E] in the type of v; N and M are multiples of T.

    Args:
      q_BNS: queries, and k_BMS, v_BME: keys and values, all bfloat16 or float32.
      windows_D2T: of `_windows`, or None.
      scales_BN2: score_scale and weight_scale of every query, float32, no gradient.
      ids_BN: segment ids of queries, 0 at padding, and ids_BM: of keys.
      first: place of the first query among the keys, int32.
      causal: whether keys after the query are hidden.
      t: T.
    """
    return _forward(q_BNS, k_BMS, v_BME, windows_D2T, scales_BN2, ids_BN, ids_BM, first, causal, t)[0]


def _forward(q_BNS, k_BMS, v_BME, windows_D2T, scales_BN2, ids_BN, ids_BM, first, causal, t):
    arrays = q_BNS, k_BMS, v_BME, windows_D2T, scales_BN2, ids_BN, ids_BM, first
    (o_BNE,) = _Call.of(*arrays, causal, t)(_output_kernel, ('o',), by_keys=False)
    return o_BNE, arrays


def _backward(causal, t, residuals, do_BNE):
    call = _Call.of(*residuals, causal, t, do_BNE)
    windows_D2T = residuals[3]
    results = ('dq',) if windows_D2T is None else ('dq', 'dwindow')
    dq_BNS, *dwindow = call(_query_gradient_kernel, results, by_keys=False)
    dk_BMS, dv_BME = call(_key_gradient_kernel, ('dk', 'dv'), by_keys=True)
    if dwindow:
        # Blocks in the same diagonal have the same window.
        x, y = jnp.arange(call.queries)[:, None], jnp.arange(call.keys)
        dwindows_XY2T = dwindow[0].sum(axis=(0, 3))
        dwindow = [jnp.zeros_like(windows_D2T).at[y - x + call.queries - 1].add(dwindows_XY2T)]
    return dq_BNS, dk_BMS, dv_BME, *(dwindow or [None]), jnp.zeros_like(residuals[4]), None, None, None


_attend.defvjp(_forward, _backward)


class _Step(NamedTuple):
    """One step of a grid [B, blocks, blocks]: its arrays in the chip's memory, by name, and where it stands.

    Attributes:
      refs: the blocks of inputs and outputs, and the scratch, which lives as long as the grid.
      first_query: place of the block's first query among the keys.
      first_key: place of its first key.
      causal: whether later keys are hidden.
    """

    refs: dict[str, Any]
    first_query: Array
    first_key: Array
    causal: bool

    def load(self, name: str) -> Array:
        """Returns a block."""
        return self.refs[name][...]

    def scores(self) -> Array:
        """Returns relu(q k^T score_scale + b) where the query sees the key, else 0; float32 [T, T]."""
        x = pallas.dot(self.load('q'), self.load('k'), 'ij,kj') * self.load('scales')[:, :1]
        t = x.shape[0]
        if 'window' in self.refs:
            x += _rows_of(self.load('window'))
        key_ids = self.load('key_ids')
        seen = (self.load('query_ids') == key_ids) & (key_ids > 0)
        if self.causal:
            place = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (t, t))
            seen &= self.first_key + place(1) <= self.first_query + place(0)
        return jnp.where(seen, jnp.maximum(x, 0.0), 0.0)

    def gradient_of_scores(self, relu: Array) -> Array:
        """Returns that of q k^T score_scale + b, given `scores`; float32 [T, T]."""
        return 2 * relu * self.load('scales')[:, 1:] * pallas.dot(self.load('do'), self.load('v'), 'ij,kj')

    def weights(self, relu: Array) -> Array:
        """Returns A, given `scores`, in the type of the values."""
        return (relu * relu * self.load('scales')[:, 1:]).astype(self.refs['v'].dtype)

    def add(self, name: str, x: Array) -> None:
        """Adds to what is summed over a row or column of blocks."""
        self.refs[f'{name}_sum'][...] += x


def _rows_of(window: Array) -> Array:
    """Returns the block [T, T] of a window [1, 2 T]: x[i, j] = window[j - i + T - 1]."""
    from jax.experimental.pallas import tpu as pltpu

    t = window.shape[1] // 2
    rows = pltpu.roll(window, t + 1, 1)
    # Twice as many rows at a time: a TPU v4 cannot shift each row by another distance.
    while len(rows) < t:
        rows = jnp.concatenate([rows, pltpu.roll(rows, len(rows), 1)], axis=0)
    return rows[:, :t]


def _window_of(block: Array) -> Array:
    """Returns the sums of a block [T, T] over equal distances, [1, 2 T], as they stand in a window."""
    from jax.experimental.pallas import tpu as pltpu

    t = len(block)
    rows = jnp.concatenate([block, jnp.zeros_like(block)], axis=1)
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] + pltpu.roll(rows[half:], 2 * t - half, 1)
    return pltpu.roll(rows, t - 1, 1)


def _output_kernel(step: _Step) -> None:
    """o = A v."""
    step.add('o', pallas.dot(step.weights(step.scores()), step.load('v')))


def _query_gradient_kernel(step: _Step) -> None:
    """Gradients of q and of the window."""
    ds = step.gradient_of_scores(step.scores())
    if 'dwindow' in step.refs:
        step.refs['dwindow'][...] = _window_of(ds)
    ds = (ds * step.load('scales')[:, :1]).astype(step.refs['k'].dtype)
    step.add('dq', pallas.dot(ds, step.load('k')))


def _key_gradient_kernel(step: _Step) -> None:
    """Gradients of k and v."""
    relu = step.scores()
    step.add('dv', pallas.dot(step.weights(relu), step.load('do'), 'ji,jk'))
    ds = (step.gradient_of_scores(relu) * step.load('scales')[:, :1]).astype(step.refs['q'].dtype)
    step.add('dk', pallas.dot(ds, step.load('q'), 'ji,jk'))


# Matmuls of a kernel with columns of E, and with columns of S.
_MATMULS = {_output_kernel: (1, 1), _query_gradient_kernel: (1, 2), _key_gradient_kernel: (2, 2)}


class _Call(NamedTuple):
    """The operands of one call, by their names in kernels, and their sizes."""

    arrays: dict[str, Array]
    first: Array
    causal: bool
    batch: int
    queries: int
    keys: int
    t: int

    @classmethod
    def of(cls, q, k, v, windows_D2T, scales_BN2, ids_BN, ids_BM, first, causal, t, do=None) -> '_Call':
        arrays = {'q': q, 'k': k, 'v': v, 'scales': scales_BN2, 'do': do}
        # Ids down a column and along a row, as they are compared.
        arrays |= {'query_ids': ids_BN[..., None], 'key_ids': ids_BM[:, None]}
        arrays['window'] = None if windows_D2T is None else windows_D2T[:, None]
        arrays = {name: x for name, x in arrays.items() if x is not None}
        return cls(arrays, first.reshape(1), causal, q.shape[0], q.shape[1] // t, k.shape[1] // t, t)

    def __call__(self, kernel: Callable[[_Step], None], outputs: Sequence[str], *, by_keys: bool) -> list[Array]:
        """Runs a kernel and returns its outputs.

        Args:
          kernel: one of those above.
          outputs: names of results.
          by_keys: whether sums run over queries, for a block of keys, or the other way round.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        sums = [name for name in outputs if name != 'dwindow']
        widths = {name: self.arrays[name.removeprefix('d') if name != 'o' else 'v'].shape[-1] for name in sums}
        scratch = {f'{name}_sum': pltpu.VMEM((self.t, widths[name]), jnp.float32) for name in sums}
        inner = self.queries if by_keys else self.keys

        def run(first_ref, *refs):
            named = dict(zip((*self.arrays, *outputs, *scratch), refs, strict=True))
            x, y = (pl.program_id(2), pl.program_id(1)) if by_keys else (pl.program_id(1), pl.program_id(2))
            step = _Step(named, first_ref[0] + x * self.t, y * self.t, self.causal)

            @pl.when(pl.program_id(2) == 0)
            def _():
                for name in scratch:
                    named[name][...] = jnp.zeros_like(named[name])

            seen = not self.causal or step.first_key < step.first_query + self.t
            pl.when(seen)(lambda: kernel(step))
            if 'dwindow' in named:

                @pl.when(jnp.logical_not(seen))
                def _():
                    named['dwindow'][...] = jnp.zeros_like(named['dwindow'])

            @pl.when(pl.program_id(2) == inner - 1)
            def _():
                for name in sums:
                    named[name][...] = named[f'{name}_sum'][...].astype(named[name].dtype)

        results = [self._result(name, widths) for name in outputs]
        call = pl.pallas_call(
            run,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.batch, self.keys, self.queries) if by_keys else (self.batch, self.queries, self.keys),
                in_specs=[self._spec(name, by_keys) for name in self.arrays],
                out_specs=[self._spec(name, by_keys) for name in outputs],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=results,
            compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
            cost_estimate=self._cost(kernel, results),
            interpret=pallas.interpreted(),
            name=f'quadratic{kernel.__name__}',
        )
        return call(self.first, *self.arrays.values())

    def _spec(self, name: str, by_keys: bool) -> Any:
        from jax.experimental import pallas as pl

        def blocks(i, j, first_ref):
            """Blocks of queries and of keys; those that no query sees stay at the next or last one that one sees."""
            x, y = (j, i) if by_keys else (i, j)
            # Of numbers that are not negative, `div` is `//`, which the compiler of kernels asks the chip's name for.
            if self.causal and by_keys:
                x_first = jax.lax.div(jnp.maximum(y * self.t - first_ref[0], 0), self.t)
                x = jnp.maximum(x, jnp.minimum(x_first, self.queries - 1))
            elif self.causal:
                y_last = jax.lax.div(first_ref[0] + (x + 1) * self.t - 1, self.t)
                y = jnp.minimum(y, jnp.minimum(y_last, self.keys - 1))
            return x, y

        if name == 'dwindow':
            return pl.BlockSpec((None, None, None, 1, 2 * self.t), lambda b, x, y, _: (b, x, y, 0, 0))
        if name == 'window':

            def diagonal(b, i, j, first_ref):
                x, y = blocks(i, j, first_ref)
                return y - x + self.queries - 1, 0, 0

            return pl.BlockSpec((None, 1, 2 * self.t), diagonal)
        if name == 'key_ids':
            return pl.BlockSpec((None, 1, self.t), lambda b, i, j, first: (b, 0, blocks(i, j, first)[1]))
        of_keys = name in ('k', 'v', 'dk', 'dv')
        width = self._width(name)
        return pl.BlockSpec((None, self.t, width), lambda b, i, j, first: (b, blocks(i, j, first)[of_keys], 0))

    def _width(self, name: str) -> int:
        same = {'o': 'v', 'dq': 'q', 'dk': 'k', 'dv': 'v'}
        return self.arrays[same.get(name, name)].shape[-1]

    def _result(self, name: str, widths: dict[str, int]) -> jax.ShapeDtypeStruct:
        if name == 'dwindow':
            return jax.ShapeDtypeStruct((self.batch, self.queries, self.keys, 1, 2 * self.t), jnp.float32)
        blocks = self.queries if name in ('o', 'dq') else self.keys
        return jax.ShapeDtypeStruct((self.batch, blocks * self.t, widths[name]), self.arrays['v'].dtype)

    def _cost(self, kernel: Callable, results: Sequence[jax.ShapeDtypeStruct]) -> Any:
        """Returns what the compiler is told: it sees into no kernel."""
        from jax.experimental import pallas as pl

        wide, narrow = _MATMULS[kernel]
        columns = wide * self.arrays['v'].shape[-1] + narrow * self.arrays['q'].shape[-1]
        pairs = self.batch * self.queries * self.keys * self.t**2 // (2 if self.causal else 1)
        arrays = (*self.arrays.values(), *results)
        return pl.CostEstimate(
            flops=2 * pairs * columns,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )
