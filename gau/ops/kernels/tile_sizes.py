"""Tile sizes of every kernel, apart from how they are launched: to tune a kernel is to change its entry here.

A `block_*` is one side of the tile that a program works on, named as the kernel's constant in capitals: a power of two,
at least 16 where the tile is a factor of a matmul. What sticks out of an array is masked, and `fit` makes tiles no
larger than a small array needs. `num_warps` are the warps of a program, `num_stages` the depth of the software pipeline
of its loops.

Entries go by the type of the arrays. Those of bfloat16 are the fastest of half a dozen to a dozen on an H100, which has
132 SMs (LOG.md, L10). Exact float32 matmuls have no matrix units: their small tiles are for proofs, not for speed.
"""

from typing import NamedTuple, TypeVar

Tiles = TypeVar('Tiles', bound=NamedTuple)


def cdiv(a: int, b: int) -> int:
    """Returns a / b rounded up: how many tiles of b cover a."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n and at least 16, the smallest side of a matrix unit's tile."""
    return max(16, 1 << (n - 1).bit_length())


def fit(tiles: Tiles, **sizes: int) -> Tiles:
    """Returns tiles whose sides, given by name, are no larger than arrays of these sizes need."""
    return tiles._replace(**{side: min(getattr(tiles, side), power_of_two(size)) for side, size in sizes.items()})


# --- gates_triton, gated_quadratic_triton: what is [N, E] -------------------------------------------------------------


class GateTiles(NamedTuple):
    """A tile has block_n tokens and block_e columns; a program that sums over tokens has `span` of them."""

    block_n: int
    block_e: int
    span: int
    num_warps: int
    num_stages: int


# Sums over tokens: three stages and 128 tokens a program, as fast as any of five on an H200 (LOG.md, L60).
GATES = GateTiles(block_n=16, block_e=128, span=128, num_warps=4, num_stages=3)


# --- gated_chunks_triton ----------------------------------------------------------------------------------------------


class ScanTiles(NamedTuple):
    """A program has block_e columns of the states and goes through the chunks block_c tokens at a time.

    With fewer than `min_warps` warps in all a sequence is cut into parts, which are scanned side by side.
    """

    block_c: int
    block_e: int
    num_warps: int
    num_stages: int
    min_warps: int


class OutputTiles(NamedTuple):
    """A tile of [C, E] is block_m by block_e, its sums run in steps of block_k."""

    block_m: int
    block_k: int
    block_e: int
    num_warps: int
    num_stages: int


class ValueAndWeightGradientTiles(NamedTuple):
    """dV has tiles block_m by block_e, sums in steps of block_k; da, dq, dk squares of `side`, steps of `inner`."""

    block_m: int
    block_k: int
    block_e: int
    side: int
    inner: int
    num_warps: int
    num_stages: int


# Twelve warps for each SM. With eight sequences of base width both scans have as many: larger tiles or fewer warps
# would cut such sequences into parts.
_MIN_WARPS = 1536
STATES = {
    # Within 1 % of the fastest of eleven on an H200, for chunks of 256 and for windows of two of 128 (LOG.md, L58).
    'bfloat16': ScanTiles(block_c=64, block_e=32, num_warps=4, num_stages=3, min_warps=_MIN_WARPS),
    'float32': ScanTiles(block_c=32, block_e=32, num_warps=4, num_stages=1, min_warps=_MIN_WARPS),
}
STATES_GRADIENT = {
    'bfloat16': ScanTiles(block_c=64, block_e=32, num_warps=4, num_stages=3, min_warps=_MIN_WARPS),
    'float32': ScanTiles(block_c=32, block_e=32, num_warps=4, num_stages=1, min_warps=_MIN_WARPS),
}
OUTPUT = {
    'bfloat16': OutputTiles(block_m=64, block_k=64, block_e=128, num_warps=4, num_stages=3),
    'float32': OutputTiles(block_m=32, block_k=32, block_e=64, num_warps=4, num_stages=1),
}
VALUE_AND_WEIGHT_GRADIENT = {
    'bfloat16': ValueAndWeightGradientTiles(
        block_m=64, block_k=64, block_e=128, side=128, inner=64, num_warps=8, num_stages=3
    ),
    'float32': ValueAndWeightGradientTiles(
        block_m=32, block_k=32, block_e=64, side=32, inner=32, num_warps=4, num_stages=1
    ),
}


# --- chunk_pairs_triton -----------------------------------------------------------------------------------------------


class PairWeightsTiles(NamedTuple):
    """A tile of the weights [C, C] is block_m by block_n."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class PairGradientTiles(NamedTuple):
    """A program has block_m rows of dq or dk, sums in steps of block_k."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


# Of window_weights_triton; no other tiles were tried.
WINDOW_GRADIENT = {
    'bfloat16': PairGradientTiles(block_m=64, block_k=64, num_warps=4, num_stages=3),
    'float32': PairGradientTiles(block_m=32, block_k=32, num_warps=4, num_stages=1),
}
PAIR_WEIGHTS = {
    'bfloat16': PairWeightsTiles(block_m=64, block_n=64, num_warps=4, num_stages=1),
    'float32': PairWeightsTiles(block_m=32, block_n=32, num_warps=4, num_stages=1),
}
PAIR_GRADIENT = {
    'bfloat16': PairGradientTiles(block_m=128, block_k=64, num_warps=8, num_stages=3),
    'float32': PairGradientTiles(block_m=32, block_k=32, num_warps=4, num_stages=1),
}


# --- quadratic_triton -------------------------------------------------------------------------------------------------


class WeightsTiles(NamedTuple):
    """A tile of the weights [n, m] is block_m queries by block_n keys; in the gradient block_m is at most block_n.

    With fewer than `min_programs` programs there are more parts: of the keys that a program goes through, or, in the
    gradient, of the batch.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_programs: int


WEIGHTS = {
    'bfloat16': WeightsTiles(block_m=64, block_n=64, num_warps=4, num_stages=2, min_programs=1024),
    'float32': WeightsTiles(block_m=32, block_n=32, num_warps=4, num_stages=1, min_programs=528),
}
# Of softmax; not timed.
LOG_SUMS = {
    'bfloat16': WeightsTiles(block_m=64, block_n=64, num_warps=4, num_stages=2, min_programs=1024),
    'float32': WeightsTiles(block_m=32, block_n=32, num_warps=4, num_stages=1, min_programs=528),
}
WEIGHTS_GRADIENT = {
    'bfloat16': WeightsTiles(block_m=64, block_n=64, num_warps=4, num_stages=3, min_programs=264),
    'float32': WeightsTiles(block_m=32, block_n=32, num_warps=4, num_stages=1, min_programs=528),
}


# --- far_chunks_triton: not timed ------------------------------------------------------------------------------------


class PairScoresTiles(NamedTuple):
    """A tile of the weights of a pair of chunks is a square of `side`; sums over E run in steps of `inner`."""

    side: int
    inner: int
    num_warps: int
    num_stages: int


FAR_WEIGHTS = {
    'bfloat16': PairWeightsTiles(block_m=64, block_n=64, num_warps=4, num_stages=2),
    'float32': PAIR_WEIGHTS['float32'],
}
FAR_SCORES_GRADIENT = {
    'bfloat16': PairScoresTiles(side=128, inner=64, num_warps=8, num_stages=3),
    'float32': PairScoresTiles(side=32, inner=32, num_warps=4, num_stages=1),
}


def far_sum_tiles(width: int, dtype: str) -> OutputTiles:
    """Returns the tiles of sums of values, or of queries and keys, so many columns wide.

    What is multiplied comes from the cache, which is fast enough for large tiles alone. Queries and keys have too few
    columns for those.
    """
    if dtype == 'float32' or width <= 256:
        return OUTPUT[dtype]
    return OutputTiles(block_m=128, block_k=64, block_e=256, num_warps=8, num_stages=3)


# --- cross_entropy_triton: a whole row of logits ----------------------------------------------------------------------


class LossTiles(NamedTuple):
    """A program has a row of up to block_v logits."""

    block_v: int
    num_warps: int
    num_stages: int


def loss_tiles(columns: int) -> LossTiles:
    """Returns the tiles for rows of so many columns: 32 logits for each thread, up to 32 warps."""
    block_v = power_of_two(columns)
    return LossTiles(block_v, num_warps=max(4, min(32, block_v // 1024)), num_stages=1)


# --- norm_triton, queries_keys_triton: whole rows ---------------------------------------------------------------------


class RowTiles(NamedTuple):
    """A tile has as many whole rows as make about `numbers` numbers, at least one row."""

    numbers: int
    num_warps: int
    num_stages: int


class RowSumTiles(NamedTuple):
    """The same, for at most `max_programs` programs, each of which sums over its rows in registers."""

    numbers: int
    num_warps: int
    num_stages: int
    max_programs: int


NORM = RowTiles(numbers=4096, num_warps=4, num_stages=1)
# Five programs for each SM, as many as its registers hold at once at a width of 768 in bfloat16.
NORM_GRADIENT = RowSumTiles(numbers=2048, num_warps=4, num_stages=1, max_programs=660)
# With the logits of a gate 64 registers, so eight programs. (2,048 numbers take 125, and four programs.)
NORM_GRADIENT_GATE = RowSumTiles(numbers=1024, num_warps=4, num_stages=1, max_programs=1056)
# The numbers of half a row: the kernels have a tile for each half.
QUERIES_KEYS = RowTiles(numbers=2048, num_warps=4, num_stages=1)
# A thread holds four numbers of each of 18 sums, 168 registers in all at four roles; with twice as many they spill.
# Three programs for each SM, as many as its registers hold at once.
QUERIES_KEYS_GRADIENT = RowSumTiles(numbers=512, num_warps=4, num_stages=1, max_programs=396)
# With shifted keys 512 numbers take 235 registers; 256 take 128, by the compiler. Neither has been timed.
QUERIES_KEYS_GRADIENT_SHIFTED = RowSumTiles(numbers=256, num_warps=4, num_stages=1, max_programs=528)


def rows_of(tiles: RowTiles | RowSumTiles, width: int) -> int:
    """Returns how many rows of `width` numbers a tile has."""
    return max(1, tiles.numbers // width)


# --- decode_chunks_triton: one token of each row ----------------------------------------------------------------------


class DecodeTiles(NamedTuple):
    """Tiles of the matmuls have up to block_b rows, sums in steps of block_k, and columns: block_n of u and v, block_h
    of either half of z, block_out of the output. Attention has block_e columns of one row, block_w places at a time; in
    far chunks far_e and far_w.
    """

    block_b: int
    block_k: int
    block_n: int
    block_h: int
    block_out: int
    num_warps: int
    num_stages: int
    block_w: int
    block_e: int
    attention_warps: int
    attention_stages: int
    far_w: int
    far_e: int


def decode_tiles(batch: int, dtype: str) -> DecodeTiles:
    """Returns the tiles for a batch: of few rows tiles are narrow, so that there are programs for all SMs."""
    if dtype == 'float32':
        near = {'block_w': 32, 'block_e': 64, 'attention_warps': 4, 'attention_stages': 1}
        return DecodeTiles(16, 32, 32, 16, 16, 4, 1, **near, far_w=32, far_e=64)
    # Every tile of far chunks reads all their keys, which are a twelfth of their values.
    if batch <= 8:
        near = {'block_w': 64, 'block_e': 32, 'attention_warps': 4, 'attention_stages': 3}
        return DecodeTiles(16, 256, 32, 16, 16, 4, 3, **near, far_w=64, far_e=64)
    near = {'block_w': 64, 'block_e': 128, 'attention_warps': 4, 'attention_stages': 3}
    return DecodeTiles(64, 128, 32, 16, 16, 4, 4, **near, far_w=32, far_e=256)


# --- decode_row_triton: one token of one row --------------------------------------------------------------------------


class DecodeRowTiles(NamedTuple):
    """Programs have block_n columns of u and v, or block_h of either half of z; block_e of o, over block_w places at a
    time, far_w in far chunks; block_d of y. Sides need no 16: there are no matrix units in it. A program has all of D,
    S and E in registers: D, E / 2 and 8 S, rounded up to powers of two, are at most `most`.
    """

    block_n: int
    block_h: int
    block_w: int
    block_e: int
    block_d: int
    num_warps: int
    most: int
    far_w: int


# Of base size 100 programs, which an H100 and an H200 have SMs for.
DECODE_ROW = DecodeRowTiles(
    block_n=32, block_h=16, block_w=256, block_e=16, block_d=8, num_warps=8, most=1024, far_w=128
)


# --- prefill_chunks_triton: a short block of a prompt -----------------------------------------------------------------


class PrefillTiles(NamedTuple):
    """Tiles of the projections have block_m rows and columns: block_n of u and v, block_h of either half of z; sums in
    steps of block_k. Those of attention have attention_m queries and block_e columns, attention_n keys at a time; those
    of the output output_m rows and block_out columns, or state_e columns of the sum; sums in steps of output_k.
    """

    block_m: int
    block_n: int
    block_h: int
    block_k: int
    num_warps: int
    num_stages: int
    attention_m: int
    attention_n: int
    block_e: int
    attention_warps: int
    attention_stages: int
    output_m: int
    block_out: int
    state_e: int
    output_k: int
    output_warps: int
    output_stages: int


PREFILL = {
    'bfloat16': PrefillTiles(128, 256, 32, 64, 8, 3, 64, 64, 128, 4, 3, 64, 128, 64, 64, 4, 4),
    'float32': PrefillTiles(32, 32, 16, 32, 4, 1, 32, 32, 64, 4, 1, 32, 32, 32, 32, 4, 1),
}
# Of long blocks: more rows for the output's tiles, and tiles of z with all columns, each an SM's half, which are the
# fastest of five (LOG.md, L67).
PREFILL_LONG = {
    'bfloat16': PREFILL['bfloat16']._replace(
        block_m=64, block_h=64, num_warps=4, output_m=128, block_out=256, output_warps=8, output_stages=3
    ),
    'float32': PREFILL['float32'],
}
# Their scan. All columns of keys are read again for each block_e of values. Two programs of 8 warps share an SM (97 and
# 126 registers), so that 16,384 tokens of base width, cut into 11 parts, have as many programs as run at once.
PREFILL_STATES = {
    'bfloat16': STATES['bfloat16']._replace(block_e=64, num_warps=8, min_warps=2112),
    'float32': STATES['float32'],
}


# --- decode_cache_triton: one token of each row, keys and values of all tokens ----------------------------------------


class CacheTiles(NamedTuple):
    """A program has block_e columns of a row and goes through up to most_blocks times block_m places of it, through
    fewer where there would be fewer than `min_programs` programs. Parts are added up block_sum columns at a time.
    """

    block_m: int
    block_e: int
    block_sum: int
    most_blocks: int
    min_programs: int
    num_warps: int
    num_stages: int


DECODE_CACHE = CacheTiles(
    block_m=64, block_e=128, block_sum=64, most_blocks=16, min_programs=528, num_warps=4, num_stages=3
)
