"""What a long block of a prompt has in the place of a short one's attention: a state for each chunk.

U and V come from the library's matmul, and weights are written once, so that who reads them has one loop of matmuls, as
in training (LOG.md, L63). The norm of x is a factor for each row, found once and taken after the matmuls.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gau.ops.decoding import State
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.decode_chunks import PRECISION, Parameters
from gau.ops.kernels.launch import launch
from gau.ops.kernels.tile_sizes import cdiv, fit, power_of_two
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.norms import NORM_EPSILON


class LongBlock(NamedTuple):
    """A block of tokens of each row, which goes on with the row's state where a chunk begins.

    Attributes:
      x_BTD: the residual stream.
      parameters: of the layer.
      old: the state; what the model does not have is any array.
      before_B: chunks before the block, int32.
      length_B: tokens of the block that are the row's, int32.
      state_scale_BG: factor on the state that each chunk reads, if there is no gate.
      spec: of the layer.
      gated: whether there is a gate.
    """

    x_BTD: Array
    parameters: Parameters
    old: State
    before_B: Array
    length_B: Array
    state_scale_BG: Array
    spec: ChunkSpec
    gated: bool

    def scales(self, gate: tuple[Array, Array]) -> list[Array]:
        """Returns the factors of the norm of all rows, and the gate's logits for its weights and bias, float32 [R]."""
        from gau.ops.kernels.prefill_long_triton import prefill_scales_kernel

        (batch, t, width), tiles = self.x_BTD.shape, tile_sizes.NORM
        block_m = tile_sizes.rows_of(tiles, power_of_two(width))
        return launch(
            prefill_scales_kernel,
            *(self.x_BTD, self.parameters.norm, *gate),
            outputs=[jax.ShapeDtypeStruct((batch * t,), jnp.float32)] * 2,
            grid=(cdiv(batch * t, block_m),),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            R=batch * t,
            D=width,
            GATED=self.gated,
            EPSILON=NORM_EPSILON,
            BLOCK_M=block_m,
            BLOCK_D=power_of_two(width),
        )

    def attention(
        self, scales_R: Array, roles_4RS: Array, logits_R: Array, bias_P: Array, scoring: dict
    ) -> tuple[Array, Array, State]:
        """Returns o and v, [R, E] each, and the new sum, and count with a gate.

        Args:
          scales_R: from `scales`, and the logits.
          roles_4RS: q, k, q_lin and k_lin.
          logits_R: of the gate.
          bias_P: relative bias by distance, or any array.
          scoring: constants that say how weights are made.
        """
        from gau.ops.kernels import prefill_long_triton as kernels

        (_, rows, inner), dtype, spec = roles_4RS.shape, str(roles_4RS.dtype), self.spec
        (batch, groups), size = self.state_scale_BG.shape, spec.chunk_size
        bias_2E, expanded = self.parameters.uv_bias_2E, self.parameters.out_ED.shape[0]
        p_R2E = self.x_BTD.reshape(rows, -1) @ self.parameters.uv_D2E.reshape(-1, 2 * expanded)
        inputs = p_R2E, scales_R, bias_2E, roles_4RS, self.before_B, self.length_B, self.state_scale_BG, logits_R
        m_BGSE, v_RE, new = self._states(inputs, rows, inner, expanded)
        sizes = {'R': rows, 'G': groups, 'C': size, 'S': inner, 'NEAR': spec.window, 'PRECISION': PRECISION}
        tiles = fit(tile_sizes.WEIGHTS[dtype], block_m=size, block_n=size)
        (a_RM,) = launch(
            kernels.prefill_weights_kernel,
            *(roles_4RS, self.before_B, self.old['k'], bias_P),
            outputs=[jax.ShapeDtypeStruct((rows, spec.window * size), dtype)],
            grid=(cdiv(size, tiles.block_m), spec.window * cdiv(size, tiles.block_n), batch * groups),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_S=power_of_two(inner),
            **scoring,
            **sizes,
        )
        tiles = fit(tile_sizes.OUTPUT[dtype], block_m=size, block_e=expanded)
        (o_RE,) = launch(
            kernels.prefill_mix_kernel,
            *(p_R2E, scales_R, bias_2E, v_RE, self.old['v'], a_RM, roles_4RS, m_BGSE, self.before_B),
            outputs=[jax.ShapeDtypeStruct((rows, expanded), dtype)],
            grid=(cdiv(size, tiles.block_m), cdiv(expanded, tiles.block_e), batch * groups),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            E=expanded,
            BLOCK_M=tiles.block_m,
            BLOCK_K=tiles.block_k,
            BLOCK_E=tiles.block_e,
            **sizes,
        )
        return o_RE, v_RE, new

    def _states(self, inputs: tuple[Array, ...], rows: int, inner: int, expanded: int) -> tuple[Array, Array, State]:
        """Returns the state that each chunk reads, scale included, [B, G, S, E]; v; and the new sum and count."""
        from gau.ops.kernels.prefill_long_triton import prefill_states_kernel

        (batch, groups), dtype, spec = self.state_scale_BG.shape, self.x_BTD.dtype, self.spec
        tiles = fit(tile_sizes.PREFILL_STATES[str(dtype)], block_c=spec.chunk_size, block_e=expanded)
        across = cdiv(expanded, tiles.block_e)
        length = cdiv(groups, min(cdiv(tiles.min_warps, batch * across * tiles.num_warps), groups))
        parts = cdiv(groups, length)
        fields = {
            'num_warps': tiles.num_warps,
            'num_stages': tiles.num_stages,
            'R': rows,
            'G': groups,
            'C': spec.chunk_size,
            'S': inner,
            'E': expanded,
            'PARTS': parts,
            'NEAR': spec.window,
            'GATED': self.gated,
            'MEAN': spec.mean,
            'PRECISION': PRECISION,
            'BLOCK_C': tiles.block_c,
            'BLOCK_S': power_of_two(inner),
            'BLOCK_E': tiles.block_e,
            'BLOCK_G': power_of_two(length + spec.window - 1),
            'BLOCK_L': power_of_two(spec.chunk_size),
        }
        inputs = *inputs, *(self.old[name] for name in ('sum', 'k_lin', 'v', 'gate', 'count'))

        def like(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype)

        values = like(rows, expanded, dtype=dtype)
        # Where there is one part nobody reads them.
        ends = factors = self.old['sum']
        made_v_RE = self.old['v']
        if parts > 1:
            ends, _, factors, made_v_RE = launch(
                prefill_states_kernel,
                *(*inputs, ends, factors, made_v_RE),
                outputs=[like(batch, parts, inner, expanded), like(1), like(2, batch, parts), values],
                grid=(across, parts, batch),
                ENDS=True,
                **fields,
            )
            values = like(1, dtype=dtype)
        m_BGSE, sum_BSE, count, v_RE = launch(
            prefill_states_kernel,
            *(*inputs, ends, factors, made_v_RE),
            outputs=[
                like(batch, groups, inner, expanded, dtype=dtype),
                like(*self.old['sum'].shape),
                like(batch, 1) if self.gated else like(1),
                values,
            ],
            grid=(across, parts, batch),
            ENDS=False,
            **fields,
        )
        return m_BGSE, v_RE if parts == 1 else made_v_RE, {'sum': sum_BSE} | ({'count': count} if self.gated else {})
