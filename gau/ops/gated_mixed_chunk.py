"""FLASH's attention with its activations and its gate in one operation (docs/paper.md section 3), the reference.

    [u, v] = silu([U, V])      o[g] = u[g] * (A[g] v[g] + Q[g] M[g])

U and V are projections before their bias and silu, A the attention weights inside chunk g, M[g] the mean or the sum of
k v^T over the tokens outside it that its queries may see. What `gau.ops.far_chunks` reads of v may be added to that
inside the brackets. `gau.ops.kernels.gated_mixed_chunk` is the fast path.
"""

from jax import Array

from gau.ops import far_chunks as far
from gau.ops.mixed_chunk_attention import ChunkSpec, mixed_chunk_attention
from gau.ops.positions import bias_matrix
from gau.ops.quadratic_attention import gate_and_values


def gated_mixed_chunk(
    p_BNW: Array,
    bias_2E: Array,
    q_BNS: Array,
    k_BNS: Array,
    q_lin_BNS: Array,
    k_lin_BNS: Array,
    *,
    spec: ChunkSpec,
    segment_ids_BN: Array | None = None,
    bias_P: Array | None = None,
    gate_BN1: Array | None = None,
    far_BNS: tuple[Array, Array] | None = None,
    far_chunks: int = 0,
) -> Array:
    """Returns silu(u) * mixed_chunk_attention(..., silu(v)) for [u, v] = p + bias, both branches, one head.

    Args:
      p_BNW: projections of the gate in the first E columns, of the values in the next E; finite at padding. Columns
        after these, of another reader, get a gradient of zeros.
      bias_2E: bias of gate and values.
      q_BNS: and k_BNS, q_lin_BNS, k_lin_BNS: see `gau.ops.mixed_chunk_attention`. At padding these, p and the
        result's gradient must be finite, and small enough for products of them to be finite too: a fast path masks
        what is made of them there, and not them.
      spec: and segment_ids_BN: see there; both branches.
      bias_P: relative bias by distance inside a chunk, [2 min(N, C) - 1], or None; where the local branch reads two
        chunks and N is above C, [4 C - 1].
      gate_BN1: see there; float32.
      far_BNS: queries and keys of `gau.ops.far_chunks`, finite at padding as the others; or None.
      far_chunks: how many chunks these read; 0 without them.

    Returns:
      [B, N, E] in the dtype of p; zeros at padding.
    """
    n = p_BNW.shape[1]
    size = n if n <= spec.chunk_size else spec.window * spec.chunk_size
    u_BNE, v_BNE = gate_and_values(p_BNW, bias_2E)
    o_BNE = mixed_chunk_attention(
        *(q_BNS, k_BNS, q_lin_BNS, k_lin_BNS, v_BNE),
        spec=spec,
        segment_ids_BN=segment_ids_BN,
        bias_CC=None if bias_P is None else bias_matrix(bias_P, size, size),
        gate_BN1=gate_BN1,
        impl='reference',
    )
    if far_BNS is not None:
        fields = {'chunk_size': spec.chunk_size, 'chunks': far_chunks, 'segment_ids_BN': segment_ids_BN}
        o_BNE += far.far_chunks(*far_BNS, v_BNE, **fields, impl='reference')
    return u_BNE * o_BNE
