"""Faster implementations of what `gau.ops` defines, each tested against its reference for values and all gradients.

| operation | its reference in `gau.ops` | fast path | its Triton kernels |
|---|---|---|---|
| FLASH, gated | `gated_chunks` | `gated_mixed_chunk`, `gated_chunks`, `chunk_scans`, `chunk_pairs`,
  `quadratic_weights`, `window_weights`, `far_chunks` | `gated_chunks_triton`, `chunk_pairs_triton`, `gates_triton`,
  `quadratic_triton`, `window_weights_triton`, `far_chunks_triton` |
| FLASH, a block of a prompt | `decoding` | `gated_mixed_chunk_block` | those of FLASH, gated |
| FLASH's layer, a block of a prompt | `decoding` | `prefill_chunks`, `prefill_long` | `prefill_chunks_triton`,
  `prefill_long_triton`, `decay_gate_triton` |
| quadratic attention, one token | `decoding` | `decode_cache` | `decode_cache_triton` |
| FLASH's layer, one token | `chunk_window` | `decode_chunks` | `decode_chunks_triton` |
| the same, of one sequence | `chunk_window` | `decode_row` | `decode_row_triton` |
| FLASH-Quad, gated | `quadratic_attention` | `gated_quadratic`, `gates`, `quadratic`, `quadratic_weights` |
  `gated_quadratic_triton`, `gates_triton`, `quadratic_triton` |
| quadratic attention | `quadratic_attention` | `quadratic`, `quadratic_weights` | `quadratic_triton` |
| queries and keys | `queries_keys` | `queries_keys` | `queries_keys_triton` |
| ScaleNorm | `norms` | `norm` | `norm_triton` |
| vocabulary loss | `cross_entropy` | `cross_entropy` | `cross_entropy_triton` |
| softmax attention | `quadratic_attention` | `cudnn_attention` | none: cuDNN's |
| FLASH, gated, on a TPU | `gated_chunks` | `gated_mixed_chunk` | `tpu_gated_chunks`,
  `sequence_shards`; in Pallas: `tpu_gated_chunks_pallas` |
| FLASH-Quad on a TPU | `quadratic_attention` | `tpu_quadratic` | none: in Pallas, the same file |
| softmax attention on a TPU | `quadratic_attention` | `splash_attention` | none: JAX's own, in Pallas |

To change a kernel: its `*_triton` file has it, with a header that says what it computes, its grid, its tiles, what it
reads and writes, and the bytes of a layer; `tile_sizes` has its tile sizes; the file of the fast path launches it. In
comments at loads BM, BN, ... are sides of tiles, BLOCK_M, BLOCK_N, ..., and `# [BM, BK] @ [BK, BN]` is the next matmul.
`launch` calls kernels, through `compat` on a GPU and `interpreter` on a CPU; `load_store` loads and stores with masks.

Kernels in Pallas: `pallas` says whether they are interpreted.

Triton, jax-triton and Pallas are imported when a kernel is launched, so that these modules can be imported without
them.
"""
