"""The gated chunk product on a GPU: which kernels run in which order, forwards and backwards.

A text of one chunk has no states, and one of two chunks needs none: where a chunk has no more tokens than two states
have rows, weights x = share q k^T of one chunk on the other cost as few products as states do, and the values that they
multiply are in the cache anyway, where states would have to be written and read again (`chunk_pairs`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.chunk_pairs import gradients_of_queries_and_keys, weights_on_other_chunk
from gau.ops.kernels.gates import gate_gradients, values
from gau.ops.kernels.launch import launch, power_of_two

# Warps that walk over the chunks at least: twelve for each multiprocessor of an H100. A long text alone has fewer, so
# it is cut into parts that start from zero, and what earlier parts hand on is added to their states. (Those who read
# the states could add it, but then they fit fewer of themselves on a multiprocessor: LOG.md.)
WALKERS = 1536


class Blocks(NamedTuple):
    """Sides of each kernel's tiles, then its warps and pipeline stages.

    Attributes:
      states, states_gradient: tokens of a chunk, E.
      output: rows, inner dimension, E.
      gradient: the same for the values, then for the weights both sides and the inner dimension.
    """

    states: tuple[int, int, int, int]
    states_gradient: tuple[int, int, int, int]
    output: tuple[int, int, int, int, int]
    gradient: tuple[int, int, int, int, int, int, int]


BLOCKS = {
    # The fastest of a dozen each on an H100 (LOG.md). For eight texts of base width both walks have WALKERS warps: with
    # larger tiles or fewer warps the texts would be cut into parts.
    'bfloat16': Blocks((64, 64, 8, 4), (64, 32, 4, 3), (64, 64, 128, 4, 3), (64, 64, 128, 128, 64, 8, 3)),
    # Exact float32 products have no matrix units: small tiles, for proofs rather than for speed.
    'float32': Blocks((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 64, 4, 1), (32, 32, 64, 32, 32, 4, 1)),
}
# What a kernel does not write.
_NOTHING = jax.ShapeDtypeStruct((1,), jnp.float32)
# How the matrix units round the factors of a float32 product: not at all.
PRECISION = 'ieee'


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def gated_chunk_matmul(
    p_BGCW: Array,
    bias_2E: Array,
    a_BGCC: Array,
    q_BGCF: Array,
    k_BGCF: Array,
    carry_mask_BGJ: Array,
    state_scale_BGJ: Array,
    causal: bool,
) -> Array:
    """Returns silu(u) * (a silu(v) + q state_scale m) for [u, v] = p + bias, [B, G, C, E]; m are states of J scans.

    The forward scan has m[0] = 0 and m[g + 1] = carry_mask[g] m[g] + k[g]^T silu(v[g]); a second one goes in reverse.
    Their m [S, E] stand one below the other, so that q and k are as wide as the scans together, F = J S.

    Args:
      p_BGCW: projections of gate and values in the first 2 E columns.
      bias_2E: their bias, float32.
      a_BGCC: weights inside chunks; zero above the diagonal if `causal`.
      q_BGCF: queries of the states; zero for what a token may not see.
      k_BGCF: keys of the states; zero for what a token does not add.
      carry_mask_BGJ: 1 where a scan carries its state on over a chunk, 0 where it drops it; float32, no gradient.
      state_scale_BGJ: factor on the state that a chunk reads; float32, not 0, no gradient.
      causal: lets tiles above the diagonal be left out.
    """
    return _forward(p_BGCW, bias_2E, a_BGCC, q_BGCF, k_BGCF, carry_mask_BGJ, state_scale_BGJ, causal)[0]


def _forward(*args):
    *arrays, causal = args
    o_BGCE, v_BGCE, states = output_and_states(*arrays, causal=causal)
    return o_BGCE, (*arrays, o_BGCE, v_BGCE, states)


def _backward(causal, residuals, do_BGCE):
    return gradients(*residuals, do_BGCE, causal=causal)


gated_chunk_matmul.defvjp(_forward, _backward)


def output_and_states(
    p: Array, bias: Array, a: Array, q: Array, k: Array, keep: Array, share: Array, *, causal: bool
) -> tuple[Array, Array, Array]:
    """Returns o of `gau.ops.gated_chunks.gated_chunk_product`, and for its gradient silu(v), and share m or x."""
    from gau.ops.kernels import gated_chunks_triton as kernels

    sizes, blocks = _Sizes(p, bias, q, keep), BLOCKS[str(p.dtype)]
    if sizes.by_walks:
        inputs, outputs = (p, bias, k, keep, share), [sizes.like_o, sizes.like_m]
        v, m = sizes.walk(kernels.states_kernel, blocks.states, inputs, outputs, reverse=False, W=p.shape[-1])
        reads, kept = (q, m), m
    else:
        v = values(p.reshape(sizes.by_token), bias, tokens_first=False).reshape(sizes.like_o.shape)
        # A chunk alone reads nothing: any array will do.
        kept = weights_on_other_chunk(q, k, share) if sizes.readers else v
        reads = kept, v
    return sizes.output(kernels.output_kernel, blocks.output, (p, bias, v, a, *reads), causal=causal), v, kept


def gradients(
    p: Array,
    bias: Array,
    a: Array,
    q: Array,
    k: Array,
    keep: Array,
    share: Array,
    o: Array,
    v: Array,
    kept: Array,
    do: Array,
    *,
    causal: bool,
) -> tuple[Array, ...]:
    """Returns the gradients of `gated_chunk_product` for p, bias, a, q, k, keep and share (zeros)."""
    from gau.ops.kernels import gated_chunks_triton as kernels

    sizes, blocks = _Sizes(p, bias, q, keep), BLOCKS[str(p.dtype)]
    half_dp, dbias_u, dmixed = gate_gradients(
        *(p.reshape(sizes.by_token), bias, do.reshape(sizes.by_token), o.reshape(sizes.by_token)), tokens_first=False
    )
    half_dp, dmixed = half_dp.reshape(p.shape), dmixed.reshape(o.shape)
    if sizes.by_walks:
        inputs, outputs = (q, dmixed, keep, share), [sizes.like_m]
        (dkv,) = sizes.walk(kernels.states_gradient_kernel, blocks.states_gradient, inputs, outputs, reverse=True)
        # Turned here, a pass over k alone, so that both products of the values' gradient are one loop there. Without
        # the barrier XLA turns the mask that made k instead, and then the gradients that go through it, twice.
        kt = jax.lax.optimization_barrier(k).swapaxes(2, 3)
        reads, results = (kt, kept, dmixed, dkv), [q, k]
    else:
        reads, results = (kept, v, dmixed, dmixed), [kept if sizes.readers else _NOTHING, _NOTHING]
    dp, dbias_v, da, dq, dk = sizes.gradient(
        *(kernels.value_and_weight_gradient_kernel, blocks.gradient),
        (p, bias, v, a, *reads, half_dp),
        [a, *results],
        causal=causal,
    )
    if sizes.readers:
        dq, dk = gradients_of_queries_and_keys(q, k, share, dq)
    elif not sizes.by_walks:
        dq, dk = jnp.zeros_like(q), jnp.zeros_like(k)
    dbias = jnp.stack([dbias_u, dbias_v.sum((0, 1))]).astype(bias.dtype)
    return dp, dbias, da, dq, dk, jnp.zeros_like(keep), jnp.zeros_like(share)


def _like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


class _Sizes:
    """The sizes of one call, and how to launch each kind of kernel over them."""

    def __init__(self, p: Array, bias: Array, q: Array, keep: Array):
        self.batch, self.groups, self.size, self.stride = p.shape
        self.width, self.inner, self.walks = bias.shape[-1], q.shape[-1], keep.shape[-1]
        self.state = self.inner // self.walks
        self.by_token = self.batch, self.groups * self.size, -1
        self.like_o = _like(p, self.batch, self.groups, self.size, self.width)
        self.like_m = _like(p, self.batch, self.groups, self.inner, self.width)
        self.by_walks = self.groups > 2 or (self.groups == 2 and self.size > 2 * self.state)
        # Chunks of a text that read the other one without states; and the width of what chunks read with, kernels' F.
        self.readers = self.walks if self.groups == 2 and not self.by_walks else 0
        self.read_width = self.inner if self.by_walks else self.size if self.readers else 0
        self.common = {'C': self.size, 'E': self.width, 'PRECISION': PRECISION}

    def walk(self, kernel, blocks, inputs, outputs, *, reverse: bool, **constants: int) -> list[Array]:
        """Launches a kernel that walks over the chunks, and carries states from each part of a long text to the others.

        Args:
          kernel: with arguments (*inputs, *outputs, totals).
          blocks: its entry of BLOCKS.
          inputs: the last two are `keep` and `share`.
          outputs: their shapes, the states last.
          reverse: whether the walk goes against the states.
          constants: of this kernel alone.
        """
        block_c, block_e, num_warps, num_stages = blocks
        block_c, block_e = min(block_c, power_of_two(self.size)), min(block_e, power_of_two(self.width))
        across = -(-self.width // block_e)
        length = -(-self.groups // min(-(-WALKERS // (self.batch * self.walks * across * num_warps)), self.groups))
        parts = -(-self.groups // length)
        keep, share = inputs[-2:]
        totals = (self.batch, parts, self.inner, self.width) if parts > 1 else (1,)
        *results, states, totals = launch(
            kernel,
            *inputs,
            outputs=[*outputs, jax.ShapeDtypeStruct(totals, jnp.float32)],
            grid=(across, parts, self.batch * self.walks),
            num_warps=num_warps,
            num_stages=num_stages,
            **self.common,
            **constants,
            F=self.inner,
            G=self.groups,
            S=self.state,
            P=parts,
            BLOCK_C=block_c,
            BLOCK_S=power_of_two(self.state),
            BLOCK_E=block_e,
        )
        if parts > 1:
            carried = self._carried(totals, keep, length=length, reverse=reverse)
            if not reverse:
                carried *= jnp.repeat(share, self.state, axis=-1)[..., None]
            states = (states.astype(jnp.float32) + carried).astype(states.dtype)
        return [*results, states]

    def _carried(self, totals_BPFE: Array, keep_BGW: Array, *, length: int, reverse: bool) -> Array:
        """Returns what reaches each chunk from the parts walked over before its own, float32 [B, G, F, E]."""
        parts = totals_BPFE.shape[1]
        # In the order of the walk's steps: the second one starts at the last chunk.
        steps_BGW = self._in_steps(keep_BGW)
        padding = ((0, 0), (0, parts * length - self.groups), (0, 0))
        kept_BPLW = jnp.pad(steps_BGW, padding, constant_values=1).reshape(self.batch, parts, length, -1)
        drops_BPW = jnp.cumsum(1 - kept_BPLW.prod(2), axis=1)
        before_BPW = jnp.pad(drops_BPW, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        # From part r to a later part p: nothing between them may drop the state.
        p = jnp.arange(parts)
        passes_BPRW = (before_BPW[:, :, None] == drops_BPW[:, None]) & (p[:, None] > p)[..., None]
        # And within the part, nothing before the chunk: after it, where the walk goes against the states.
        around = jnp.flip if reverse else lambda x, _: x
        kept_BPLW = around(jnp.cumprod(around(kept_BPLW, 2), axis=2), 2)
        kept_BPLW = jnp.roll(kept_BPLW, -1 if reverse else 1, axis=2).at[:, :, -1 if reverse else 0].set(1)
        if reverse:
            passes_BPRW = passes_BPRW.swapaxes(1, 2)
        totals_BPWSE = totals_BPFE.reshape(self.batch, parts, self.walks, self.state, self.width)
        carry_BPWSE = jnp.einsum(
            'BPRW,BRWSE->BPWSE', passes_BPRW.astype(jnp.float32), totals_BPWSE, precision=jax.lax.Precision.HIGHEST
        )
        reaches_BPLWSE = kept_BPLW[..., None, None] * carry_BPWSE[:, :, None]
        reaches_BGWSE = reaches_BPLWSE.reshape(self.batch, -1, *carry_BPWSE.shape[2:])[:, : self.groups]
        return self._in_steps(reaches_BGWSE).reshape(self.batch, self.groups, self.inner, self.width)

    def _in_steps(self, x_BGW: Array) -> Array:
        """Turns the chunks of the second walk round: from their order in the text to that of its steps, and back."""
        return jnp.stack([x_BGW[:, :: -1 if walk else 1, walk] for walk in range(self.walks)], axis=2)

    def output(self, kernel, blocks, inputs, *, causal: bool) -> Array:
        """Launches a kernel over tiles of [C, E]."""
        block_m, block_k, block_e, num_warps, num_stages = blocks
        block_m, block_e = min(block_m, power_of_two(self.size)), min(block_e, power_of_two(self.width))
        return launch(
            kernel,
            *inputs,
            outputs=[self.like_o],
            grid=(-(-self.size // block_m), -(-self.width // block_e), self.batch * self.groups),
            num_warps=num_warps,
            num_stages=num_stages,
            **self.common,
            F=self.read_width,
            W=self.stride,
            CAUSAL=causal,
            READERS=self.readers,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_E=block_e,
        )[0]

    def gradient(self, kernel, blocks, inputs, results, *, causal: bool) -> list[Array]:
        """Launches a kernel over tiles of [C, C], of [C, F] once or, for states, twice, and of [C, E].

        Returns what took over the last input, the sums over tokens of what was written there, and arrays like
        `results`.
        """
        block_m, block_k, block_e, side, inner, num_warps, num_stages = blocks
        block_m, block_e = min(block_m, power_of_two(self.size)), min(block_e, power_of_two(self.width))
        across, across_f, down = -(-self.size // side), -(-self.read_width // side), -(-self.size // block_m)
        tiles = across * (across + across_f * (2 if self.by_walks else 1)) + down * -(-self.width // block_e)
        sums = jax.ShapeDtypeStruct((self.batch * self.groups, down, self.width), jnp.float32)
        return launch(
            kernel,
            *inputs,
            outputs=[_like(inputs[-1], *inputs[-1].shape), sums, *(_like(x, *x.shape) for x in results)],
            grid=(tiles, self.batch * self.groups),
            num_warps=num_warps,
            num_stages=num_stages,
            overwrite={len(inputs) - 1: 0},
            **self.common,
            F=self.read_width,
            W=self.stride,
            CAUSAL=causal,
            READERS=self.readers,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_E=block_e,
            SIDE=side,
            INNER=inner,
        )
