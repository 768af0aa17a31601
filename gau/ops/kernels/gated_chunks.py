"""The gated chunk matmul on a GPU: the operation with its own gradient, and which kernels run in which order.

    o[g] = silu(U[g]) * (A[g] v[g] + Q[g] M[g])      v = silu(V)

A sequence of one chunk has no states M, and one of two chunks needs none: where a chunk has no more tokens than two
states have rows, weights x = state_scale q k^T of one chunk on the other cost as few matmuls as states do, and the
values that they multiply are in the cache anyway, where states would have to be written and read again (`chunk_pairs`).

In a window of two chunks the weights A are on the chunk before as well, and chunk g reads the state M[g - 1]. What is
read of earlier chunks by softmax (`far_chunks`) is added to what the gate multiplies; kernels find it, and the gradient
that it gives the values, in arrays that their sums begin with.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels import far_chunks, tile_sizes
from gau.ops.kernels.chunk_pairs import gradients_of_queries_and_keys, weights_on_other_chunk
from gau.ops.kernels.chunk_scans import gradient_of_added, values_and_states
from gau.ops.kernels.far_chunks import Far
from gau.ops.kernels.gates import gate_gradients, values
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import cdiv, fit

# How the matrix units round the factors of a float32 matmul: not at all.
PRECISION = 'ieee'


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def gated_chunk_matmul(
    p_BGCW: Array,
    bias_2E: Array,
    a_BGCM: Array,
    q_BGCF: Array,
    k_BGCF: Array,
    carry_mask_BGJ: Array,
    state_scale_BGJ: Array,
    causal: bool,
    far: Far | None = None,
) -> Array:
    """Returns silu(u) * (a silu(v) + q state_scale m) for [u, v] = p + bias, [B, G, C, E]; m are states of J scans.

    The forward scan has m[0] = 0 and m[g + 1] = carry_mask[g] m[g] + k[g]^T silu(v[g]); a second one goes in reverse.
    Their m [S, E] stand one below the other, so that q and k are as wide as the scans together, F = J S.

    With weights on two chunks, which are causal, a chunk g has [silu(v[g - 1]); silu(v[g])] in the place of silu(v[g]),
    and state_scale[g - 1] m[g - 1] in that of state_scale[g] m[g].

    Args:
      p_BGCW: projections of gate and values in the first 2 E columns.
      bias_2E: their bias, float32.
      a_BGCM: weights inside chunks, [B, G, C, C]; or on the chunk before and the own one, [B, G, C, 2 C], of which the
        first half is not read in the first chunk. On the own chunk zero above the diagonal if `causal`.
      q_BGCF: queries of the states; zero for what a token may not see.
      k_BGCF: keys of the states; zero for what a token does not add.
      carry_mask_BGJ: 1, or what a gate keeps, where a scan carries its state on over a chunk, 0 where it drops it;
        float32. It has a gradient if `causal`, where there are states.
      state_scale_BGJ: factor on the state that a chunk reads; float32, not 0. It has a gradient as the mask has.
      causal: lets tiles above the diagonal be left out.
      far: earlier chunks of which the values silu(v) are read by softmax, added to what the gate multiplies; or None.
    """
    return _forward(p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGJ, state_scale_BGJ, causal, far)[0]


def _forward(p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGJ, state_scale_BGJ, causal, far):
    sizes = _Sizes.of(p_BGCW, bias_2E, a_BGCM, q_BGCF, state_scale_BGJ)
    if sizes.has_states:
        v_BGCE, states = values_and_states(p_BGCW, bias_2E, k_BGCF, carry_mask_BGJ, state_scale_BGJ)
        read = q_BGCF, states
    else:
        v_BGCE = values(_by_token(p_BGCW), bias_2E, tokens_first=False).reshape(*p_BGCW.shape[:3], -1)
        # Where nothing is read any array will do.
        states = weights_on_other_chunk(q_BGCF, k_BGCF, state_scale_BGJ) if sizes.cross_chunk else v_BGCE
        read = states, v_BGCE
    far_BGCE, far_log_sum_BGC = (None, None) if far is None else far_chunks.attend(far, v_BGCE)
    o_BGCE = _output(sizes, (p_BGCW, bias_2E, v_BGCE, a_BGCM, *read), far_BGCE, causal=causal)
    arrays = p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGJ, state_scale_BGJ
    # In the place of states may stand weights on the other chunk.
    return o_BGCE, (*arrays, (far, far_log_sum_BGC), o_BGCE, v_BGCE, states)


def _backward(causal, residuals, do_BGCE):
    p_BGCW, bias_2E, a_BGCM, q_BGCF, k_BGCF, carry_mask_BGJ, state_scale_BGJ, of_far, o_BGCE, v_BGCE, states = residuals
    sizes = _Sizes.of(p_BGCW, bias_2E, a_BGCM, q_BGCF, state_scale_BGJ)
    dp_of_gate, dbias_u_E, dmixed = gate_gradients(
        *(_by_token(p_BGCW), bias_2E, _by_token(do_BGCE), _by_token(o_BGCE)), tokens_first=False
    )
    dp_of_gate, dmixed_BGCE = dp_of_gate.reshape(p_BGCW.shape), dmixed.reshape(o_BGCE.shape)
    if sizes.has_states:
        dkv_BGFE = gradient_of_added(q_BGCF, dmixed_BGCE, carry_mask_BGJ, state_scale_BGJ, window=sizes.window)
        # Transposed here, a pass over k alone, so that both matmuls of the values' gradient are one loop in the kernel.
        # Without the barrier XLA transposes the mask that made k instead, and then the gradients that go through it,
        # twice.
        kt_BGFC = jax.lax.optimization_barrier(k_BGCF).swapaxes(2, 3)
        read, results = (kt_BGFC, states, dmixed_BGCE, dkv_BGFE), [q_BGCF, k_BGCF]
    else:
        read = states, v_BGCE, dmixed_BGCE, dmixed_BGCE
        # Of the type of the others: the kernel has one place where it stores da, dq and dk.
        nothing = jax.ShapeDtypeStruct((1,), a_BGCM.dtype)
        results = [states if sizes.cross_chunk else nothing, nothing]
    (far, far_log_sum_BGC), dfar, far_dv_BGCE = of_far, None, None
    if far is not None:
        dfar, far_dv_BGCE = far_chunks.gradients(far, v_BGCE, far_log_sum_BGC, dmixed_BGCE)
    inputs = p_BGCW, bias_2E, v_BGCE, a_BGCM, *read
    dp_BGCW, dbias_v, da_BGCM, dq, dk = _gradients(
        sizes, inputs, far_dv_BGCE, dp_of_gate, [a_BGCM, *results], causal=causal
    )
    if sizes.cross_chunk:
        dq, dk = gradients_of_queries_and_keys(q_BGCF, k_BGCF, state_scale_BGJ, dq)
    elif not sizes.has_states:
        dq, dk = jnp.zeros_like(q_BGCF), jnp.zeros_like(k_BGCF)
    dbias_2E = jnp.stack([dbias_u_E, dbias_v.sum((0, 1))]).astype(bias_2E.dtype)
    dfactors = jnp.zeros_like(carry_mask_BGJ), jnp.zeros_like(state_scale_BGJ)
    if causal and sizes.has_states:
        fields = (q_BGCF, dq), state_scale_BGJ, sizes.window
        dfactors = _factor_gradients(states, dkv_BGFE, carry_mask_BGJ, *fields)
    return dp_BGCW, dbias_2E, da_BGCM, dq, dk, *dfactors, dfar


gated_chunk_matmul.defvjp(_forward, _backward)


def _factor_gradients(
    states_BGFE: Array,
    dkv_BGFE: Array,
    carry_mask_BG1: Array,
    queries: tuple[Array, Array],
    state_scale_BG1: Array,
    window: int,
) -> tuple[Array, Array]:
    """Returns the gradients of the carry mask and of the scale of a forward scan.

    (By pairs of chunks carry[g] times its gradient is a difference of two sums over chunks, of q dq and of k dk, which
    would need no state. But where a gate forgets it is small, and rounding is as large as the sums: LOG.md, L58.)

    Args:
      states_BGFE: state_scale m of each chunk.
      dkv_BGFE: gradient of what each chunk adds, which is that of the state after it.
      carry_mask_BG1: factor on the state.
      queries: q and its gradient, [B, G, C, F]. Chunk g reads m[g], or m[g - 1] in a window of two.
      state_scale_BG1: factor on the state where it is read.
      window: 1 or 2.
    """
    dtype = carry_mask_BG1.dtype
    # The first chunk has zeros to carry on, and nobody reads what the last ones would.
    both_BGFE = (x[:, 1 : x.shape[1] - window] for x in (states_BGFE, dkv_BGFE))
    dcarry_BG = jnp.einsum('BGFE,BGFE->BG', *both_BGFE, preferred_element_type=dtype)
    dcarry_BG = jnp.pad(dcarry_BG, ((0, 0), (1, window)))
    read_BG = jnp.einsum('BGCF,BGCF->BG', *queries, preferred_element_type=dtype)
    # By the state that is read.
    read_BG = jnp.pad(read_BG[:, window - 1 :], ((0, 0), (0, window - 1)))
    return dcarry_BG[..., None] / state_scale_BG1, read_BG[..., None] / state_scale_BG1


def gated_chunk_matmul_from_state(
    p_BGCW: Array,
    bias_2E: Array,
    a_BGCM: Array,
    q_BGCS: Array,
    k_BGCS: Array,
    carry_mask_BG1: Array,
    state_scale_BG1: Array,
    state_BSE: Array,
) -> tuple[Array, Array]:
    """The causal `gated_chunk_matmul` of a sequence that goes on: its scan begins with a state. Without a gradient.

    Args:
      p_BGCW: and the others: see there.
      state_BSE: m of the first chunk, float32.

    Returns:
      The output and the values silu(v), [B, G, C, E].
    """
    v_BGCE, m_BGSE = values_and_states(p_BGCW, bias_2E, k_BGCS, carry_mask_BG1, state_scale_BG1)
    ones_B11 = jnp.ones_like(carry_mask_BG1[:, :1])
    reached_BG1 = jnp.cumprod(jnp.concatenate([ones_B11, carry_mask_BG1[:, :-1]], axis=1), axis=1) * state_scale_BG1
    m_BGSE = (m_BGSE.astype(jnp.float32) + reached_BG1[..., None] * state_BSE[:, None]).astype(m_BGSE.dtype)
    sizes = _Sizes.of(p_BGCW, bias_2E, a_BGCM, q_BGCS, state_scale_BG1)
    sizes = sizes._replace(has_states=True, cross_chunk=0, read_width=q_BGCS.shape[-1])
    return _output(sizes, (p_BGCW, bias_2E, v_BGCE, a_BGCM, q_BGCS, m_BGSE), None, causal=True), v_BGCE


class _Sizes(NamedTuple):
    """The sizes of one call.

    Attributes:
      chunks: B G, the chunks of the batch.
      groups: G, the chunks of a sequence.
      size: C.
      width: E.
      columns: W.
      window: chunks that weights are on, 1 or 2.
      has_states: whether chunks read states, and not the other chunk of two, or nothing.
      cross_chunk: how many chunks of a sequence read the other one without states (0, 1, 2).
      read_width: F of the kernels: columns of what a chunk reads with, its queries or its weights on the other chunk.
    """

    chunks: int
    groups: int
    size: int
    width: int
    columns: int
    window: int
    has_states: bool
    cross_chunk: int
    read_width: int

    @classmethod
    def of(cls, p_BGCW: Array, bias_2E: Array, a_BGCM: Array, q_BGCF: Array, state_scale_BGJ: Array) -> '_Sizes':
        batch, groups, size, columns = p_BGCW.shape
        inner, directions = q_BGCF.shape[-1], state_scale_BGJ.shape[-1]
        window = a_BGCM.shape[-1] // size
        pair = groups == 2 and window == 1
        has_states = groups > 2 or (pair and size > 2 * (inner // directions))
        cross_chunk = directions if pair and not has_states else 0
        read_width = inner if has_states else size if cross_chunk else 0
        chunks, width = batch * groups, bias_2E.shape[-1]
        return cls(chunks, groups, size, width, columns, window, has_states, cross_chunk, read_width)

    def constants(self, *, causal: bool) -> dict:
        """Returns the constants that both kernels have."""
        return {
            'G': self.groups,
            'C': self.size,
            'F': self.read_width,
            'E': self.width,
            'W': self.columns,
            'CAUSAL': causal,
            'WINDOW': self.window,
            'CROSS_CHUNK': self.cross_chunk,
            'PRECISION': PRECISION,
        }


def _by_token(x_BGCX: Array) -> Array:
    """Returns chunks as sequences, [B, G C, columns]."""
    return x_BGCX.reshape(x_BGCX.shape[0], -1, x_BGCX.shape[-1])


def _output(sizes: _Sizes, inputs: Sequence[Array], far_BGCE: Array | None, *, causal: bool) -> Array:
    """Launches `output_kernel`.

    Args:
      sizes: of the call.
      inputs: p, bias, v, a, and what is read: q and m, or the weights x and v.
      far_BGCE: what is read of far chunks, or None.
      causal: whether weights above the diagonal are zero.
    """
    from gau.ops.kernels.gated_chunks_triton import output_kernel

    v_BGCE = inputs[2]
    tiles = fit(tile_sizes.OUTPUT[str(v_BGCE.dtype)], block_m=sizes.size, block_e=sizes.width)
    return launch(
        output_kernel,
        *(*inputs, v_BGCE if far_BGCE is None else far_BGCE),
        outputs=[jax.ShapeDtypeStruct(v_BGCE.shape, v_BGCE.dtype)],
        grid=(cdiv(sizes.size, tiles.block_m), cdiv(sizes.width, tiles.block_e), sizes.chunks),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        BLOCK_M=tiles.block_m,
        FAR=far_BGCE is not None,
        BLOCK_K=tiles.block_k,
        BLOCK_E=tiles.block_e,
        **sizes.constants(causal=causal),
    )[0]


def _gradients(
    sizes: _Sizes, inputs: Sequence[Array], far_dv_BGCE: Array | None, dp: Array, results: Sequence, *, causal: bool
) -> list[Array]:
    """Launches `value_and_weight_gradient_kernel`.

    Args:
      sizes: of the call.
      inputs: the kernel's, without the last two.
      far_dv_BGCE: the gradient of the values from far chunks, or None.
      dp: has dU in its columns.
      results: arrays as large as the gradients of a, q and k.
      causal: whether weights above the diagonal are zero.

    Returns:
      dp with dV in its columns, sums of that over tokens [B G, tiles, E], and arrays like `results`.
    """
    from gau.ops.kernels.gated_chunks_triton import value_and_weight_gradient_kernel

    def like(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    inputs = *inputs, inputs[2] if far_dv_BGCE is None else far_dv_BGCE, dp
    tiles = fit(tile_sizes.VALUE_AND_WEIGHT_GRADIENT[str(dp.dtype)], block_m=sizes.size, block_e=sizes.width)
    across, across_f = cdiv(sizes.size, tiles.side), cdiv(sizes.read_width, tiles.side)
    across_a = across * sizes.window
    down = cdiv(sizes.size, tiles.block_m)
    # da, dq and, for states, dk.
    squares = across * (across_a + across_f * (2 if sizes.has_states else 1))
    sums = jax.ShapeDtypeStruct((sizes.chunks, down, sizes.width), jnp.float32)
    return launch(
        value_and_weight_gradient_kernel,
        *inputs,
        outputs=[like(dp), sums, *map(like, results)],
        grid=(squares + down * cdiv(sizes.width, tiles.block_e), sizes.chunks),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        overwrite={len(inputs) - 1: 0},
        FAR=far_dv_BGCE is not None,
        BLOCK_M=tiles.block_m,
        BLOCK_K=tiles.block_k,
        BLOCK_E=tiles.block_e,
        SIDE=tiles.side,
        INNER=tiles.inner,
        **sizes.constants(causal=causal),
    )
