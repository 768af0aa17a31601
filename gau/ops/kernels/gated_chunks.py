"""The gated chunk product on a GPU: which kernels run in which order, forwards and backwards."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.kernels.launch import launch, power_of_two

# Programs that a walk over the chunks has at least: some for each multiprocessor of an H100. A long text alone has
# fewer, so it is cut into parts that start from zero, and readers add to a state what other parts handed on.
WALKERS = 264
# E of a walker, for this count.
WALK_WIDTH = 64


class States(NamedTuple):
    """States at every chunk, as a walk in P parts left them.

    Attributes:
      own: what the chunks of the same part summed up, [B, G, F, E].
      carry: what reaches each part from the others, float32 [B, P, F, E]; [1] if there is one part.
      reach: 1 for a chunk and a walk's direction where that reaches the chunk, else 0, float32 [B, G, F / S]; or [1].
    """

    own: Array
    carry: Array
    reach: Array


class Blocks(NamedTuple):
    """Sides of each kernel's tiles, then its warps and pipeline stages.

    Attributes:
      states, gate_gradient: tokens of a chunk, E.
      output, value_gradient: rows, inner dimension, E.
      weight_gradient: both sides, inner dimension.
    """

    states: tuple[int, int, int, int]
    gate_gradient: tuple[int, int, int, int]
    output: tuple[int, int, int, int, int]
    value_gradient: tuple[int, int, int, int, int]
    weight_gradient: tuple[int, int, int, int]


BLOCKS = {
    # The fastest of a dozen each on an H100 (LOG.md).
    'bfloat16': Blocks((64, 32, 4, 3), (64, 32, 4, 3), (128, 64, 64, 4, 3), (128, 64, 64, 4, 3), (128, 64, 4, 3)),
    # Exact float32 products have no matrix units: small tiles, for proofs rather than for speed.
    'float32': Blocks((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 64, 4, 1), (32, 32, 64, 4, 1), (32, 32, 4, 1)),
}
# How the matrix units round the factors of a float32 product: not at all.
PRECISION = 'ieee'


def product_and_states(
    uv: Array, bias: Array, a: Array, q: Array, k: Array, keep: Array, *, causal: bool
) -> tuple[Array, States]:
    """Returns o of `gau.ops.gated_chunks.gated_chunk_product` and the states m, which its gradient wants too."""
    from gau.ops.kernels import gated_chunks_triton as kernels

    batch, groups, size, _, width = uv.shape
    sizes, blocks = _Sizes(uv, q, keep), BLOCKS[str(uv.dtype)]
    m = sizes.walk(kernels.states_kernel, blocks.states, (uv, bias, k, keep), [], reverse=False)[-1]
    inputs, outputs = (uv, bias, a, q, *m), [_like(uv, batch, groups, size, width)]
    return sizes.tiles(kernels.output_kernel, blocks.output, inputs, outputs, causal=causal)[0], m


def gradients(
    uv: Array, bias: Array, a: Array, q: Array, k: Array, keep: Array, m: States, o: Array, do: Array, *, causal: bool
) -> tuple[Array, ...]:
    """Returns the gradients of `gated_chunk_product` for uv, bias, a, q, k and keep (zeros)."""
    from gau.ops.kernels import gated_chunks_triton as kernels

    batch, groups, size, _, width = uv.shape
    sizes, blocks = _Sizes(uv, q, keep), BLOCKS[str(uv.dtype)]
    dbias = jax.ShapeDtypeStruct((batch, sizes.parts, width), jnp.float32)
    half_duv, dmixed, dbias_u, dkv = sizes.walk(
        *(kernels.gate_gradient_kernel, blocks.gate_gradient, (uv, bias, do, o, q, keep)),
        [_like(uv, *uv.shape), _like(uv, *do.shape), dbias],
        reverse=True,
    )
    rows = -(-size // min(blocks.value_gradient[0], power_of_two(size)))
    inputs = (uv, bias, a, k, dmixed, *dkv, half_duv)
    duv, dbias_v = sizes.tiles(
        *(kernels.value_gradient_kernel, blocks.value_gradient, inputs),
        [_like(uv, *uv.shape), jax.ShapeDtypeStruct((batch * groups, rows, width), jnp.float32)],
        causal=causal,
        overwrite={len(inputs) - 1: 0},
    )
    inputs = (uv, bias, *m, dmixed, *dkv)
    da, dq, dk = sizes.squares(kernels.weight_gradient_kernel, blocks.weight_gradient, inputs, [a, q, k], causal=causal)
    dbias = jnp.stack([dbias_u.sum((0, 1)), dbias_v.sum((0, 1))]).astype(bias.dtype)
    return duv, dbias, da, dq, dk, jnp.zeros_like(keep)


def _like(array: Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, array.dtype)


class _Sizes:
    """The sizes of one call, and how to launch each kind of kernel over them."""

    def __init__(self, uv: Array, q: Array, keep: Array):
        self.batch, self.groups, self.size, _, self.width = uv.shape
        self.inner, self.walks = q.shape[-1], keep.shape[-1]
        self.state = self.inner // self.walks
        self.like_m = _like(uv, self.batch, self.groups, self.inner, self.width)
        across = -(-self.width // WALK_WIDTH)
        self.length = -(-self.groups // min(-(-WALKERS // (self.batch * self.walks * across)), self.groups))
        self.parts = -(-self.groups // self.length)
        self.common = {
            'G': self.groups,
            'C': self.size,
            'S': self.state,
            'F': self.inner,
            'E': self.width,
            'P': self.parts,
            'PRECISION': PRECISION,
        }

    def walk(self, kernel, blocks, inputs, outputs, *, reverse: bool) -> list[Array | States]:
        """Launches a kernel that walks over the chunks, with arguments (*inputs, *outputs, states, totals of parts).

        Args:
          kernel: the kernel.
          blocks: its entry of BLOCKS.
          inputs: the last one is `keep`.
          outputs: shapes of what it writes besides the states.
          reverse: whether the walk goes against the states.

        Returns:
          Those outputs, and the states.
        """
        block_c, block_e, num_warps, num_stages = blocks
        block_c, block_e = min(block_c, power_of_two(self.size)), min(block_e, power_of_two(self.width))
        totals = (self.batch, self.parts, self.inner, self.width) if self.parts > 1 else (1,)
        *results, own, totals = launch(
            kernel,
            *inputs,
            outputs=[*outputs, self.like_m, jax.ShapeDtypeStruct(totals, jnp.float32)],
            grid=(-(-self.width // block_e), self.parts, self.batch * self.walks),
            num_warps=num_warps,
            num_stages=num_stages,
            **self.common,
            BLOCK_C=block_c,
            BLOCK_S=power_of_two(self.state),
            BLOCK_E=block_e,
        )
        carried = self._carried(totals, inputs[-1], reverse=reverse) if self.parts > 1 else (totals, totals)
        return [*results, States(own, *carried)]

    def _carried(self, totals_BPFE: Array, keep_BGW: Array, *, reverse: bool) -> tuple[Array, Array]:
        """Returns what reaches each part from those walked over before it, and which chunks of the part it reaches."""
        # In the order of the walk's steps: the second one starts at the last chunk.
        steps_BGW = self._in_steps(keep_BGW)
        padding = ((0, 0), (0, self.parts * self.length - self.groups), (0, 0))
        kept_BPLW = jnp.pad(steps_BGW, padding, constant_values=1).reshape(self.batch, self.parts, self.length, -1)
        drops_BPW = jnp.cumsum(1 - kept_BPLW.prod(2), axis=1)
        before_BPW = jnp.pad(drops_BPW, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        # From part r to a later part p: nothing between them may drop the state.
        p = jnp.arange(self.parts)
        passes_BPRW = (before_BPW[:, :, None] == drops_BPW[:, None]) & (p[:, None] > p)[..., None]
        if reverse:
            passes_BPRW = passes_BPRW.swapaxes(1, 2)
        totals_BPWSE = totals_BPFE.reshape(self.batch, self.parts, self.walks, self.state, self.width)
        carry_BPWSE = jnp.einsum(
            'BPRW,BRWSE->BPWSE', passes_BPRW.astype(jnp.float32), totals_BPWSE, precision=jax.lax.Precision.HIGHEST
        )
        # And within the part, nothing before the chunk: after it, where the walk goes against the states.
        around = jnp.flip if reverse else lambda x, _: x
        kept_BPLW = around(jnp.cumprod(around(kept_BPLW, 2), axis=2), 2)
        kept_BPLW = jnp.roll(kept_BPLW, -1 if reverse else 1, axis=2).at[:, :, -1 if reverse else 0].set(1)
        reach_BGW = self._in_steps(kept_BPLW.reshape(self.batch, -1, self.walks)[:, : self.groups])
        return carry_BPWSE.reshape(totals_BPFE.shape), reach_BGW

    def _in_steps(self, x_BGW: Array) -> Array:
        """Turns the chunks of the second walk round: from their order in the text to that of its steps, and back."""
        return jnp.stack([x_BGW[:, :: -1 if walk else 1, walk] for walk in range(self.walks)], axis=2)

    def tiles(self, kernel, blocks, inputs, outputs, *, causal: bool, overwrite=None) -> list[Array]:
        """Launches a kernel over tiles of [C, E]."""
        block_m, block_k, block_e, num_warps, num_stages = blocks
        block_m, block_e = min(block_m, power_of_two(self.size)), min(block_e, power_of_two(self.width))
        return launch(
            kernel,
            *inputs,
            outputs=outputs,
            grid=(-(-self.size // block_m), -(-self.width // block_e), self.batch * self.groups),
            num_warps=num_warps,
            num_stages=num_stages,
            overwrite=overwrite,
            **self.common,
            CAUSAL=causal,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            BLOCK_E=block_e,
        )

    def squares(self, kernel, blocks, inputs, results, *, causal: bool) -> list[Array]:
        """Launches a kernel over tiles of [C, C] and twice [C, F]."""
        block_m, block_k, num_warps, num_stages = blocks
        across, across_f = -(-self.size // block_m), -(-self.inner // block_m)
        return launch(
            kernel,
            *inputs,
            outputs=[_like(x, *x.shape) for x in results],
            grid=(across * (across + 2 * across_f), self.batch * self.groups),
            num_warps=num_warps,
            num_stages=num_stages,
            **self.common,
            CAUSAL=causal,
            BLOCK_M=block_m,
            BLOCK_K=block_k,
        )
