"""FLASH's layer for one token, and its attention for a block of a prompt, in kernels, against the reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.chunk_window import open_window, window_token
from gau.ops.decoding import DecodePosition, mixed_chunk_block
from gau.ops.far_decoding import chosen_chunks_token
from gau.ops.kernels import decode_row
from gau.ops.kernels.decode_chunks import Parameters, decode_gated_chunks
from gau.ops.kernels.gated_mixed_chunk_block import gated_mixed_chunk_block
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.norms import scale_norm
from gau.ops.positions import apply_rope, bias_matrix, rope_table
from gau.ops.quadratic_attention import gate_and_values
from gau.ops.scores import Scoring
from tests.numerics import max_error, normal
from tests.ops.kernels.conftest import BOTH_DTYPES, TOLERANCE


class Sizes(NamedTuple):
    """Of a layer: C, S, E and D."""

    chunk: int
    inner: int
    expanded: int
    width: int


SMALL = Sizes(12, 8, 40, 24)
# As wide as the tiles of a GPU are: with parameters of this size none is cut.
LARGE = Sizes(128, 128, 256, 256)
C, S, E, D = SMALL
WINDOW = 7
# Far chunks that are read.
R = 3
SPECS = {
    'mean': ChunkSpec(C, Scoring('relu2', 'paper'), True),
    'sum, su': ChunkSpec(C, Scoring('relu2', 'su'), True, global_reduction='sum'),
    'mean, visible': ChunkSpec(C, Scoring('relu2', 'visible'), True),
}
B = 5


def before(dtype, sizes=SMALL):
    return normal(8, B, sizes.inner).astype(dtype)


def state_of(dtype, chunks=1, sizes=SMALL):
    size, inner, expanded, _ = sizes
    places = chunks * size
    parts = {'k': (places, inner), 'k_lin': (places, inner), 'v': (places, expanded), 'sum': (inner, expanded)}
    state = {name: normal(i, B, *shape) for i, (name, shape) in enumerate(parts.items())}
    return {name: x.astype(dtype if name != 'sum' or dtype == 'float64' else 'float32') for name, x in state.items()}


def window_of(dtype, chunks=1, sizes=SMALL):
    """A window with something at all its places."""
    window, old = open_window(state_of(dtype, chunks, sizes), WINDOW), chunks * sizes.chunk
    return {
        name: x if name in ('sum', 'arrivals') else x.at[:, old:].set(normal(9, *x[:, old:].shape).astype(dtype))
        for name, x in window.items()
    }


def cut(window, rows):
    return {name: x[rows] for name, x in window.items()}


def far_window(groups, sizes=SMALL):
    """What a window of so many far chunks has of them, float64, with something at all its places.

    Rows have read four chunks and more; the current chunk and the next read any that are complete.
    """
    means_BGS = normal(62, B, groups, sizes.inner)
    # Many that fit alike, among blocks of chunks and in other ones.
    means_BGS = means_BGS[:, jnp.arange(groups) % 5] if groups > 6 else means_BGS
    return {
        'far_k': normal(60, B, groups * sizes.chunk, sizes.inner),
        'far_v': normal(61, B, groups * sizes.chunk, sizes.expanded),
        'far_mean': means_BGS,
        'far_query': sizes.chunk**0.5 * normal(63, B, sizes.inner),
        'far_index': jnp.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 1]], jnp.int32),
        'far_next': jnp.array([[0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 1], [3, 1, 2]], jnp.int32),
    }


def far_narrow(window, dtype):
    types = {'far_k': dtype, 'far_v': dtype, 'far_mean': 'float32', 'far_query': 'float32'}
    return {name: x.astype(types.get(name, x.dtype)) for name, x in window.items()}


def expect_close(found, wanted, dtype, name):
    a, b = (np.asarray(x, np.float64) for x in (found, wanted))
    assert max_error(a, b) < TOLERANCE[dtype], name


@pytest.mark.parametrize('dtype', BOTH_DTYPES)
@pytest.mark.parametrize(
    ('case', 'rows'),
    [
        ('mean, visible; shifted gated two', slice(None)),
        # A row alone has a kernel of its own: beyond the border that its window crosses, and in its first chunk.
        ('mean, visible; shifted gated two', slice(4, 5)),
        ('mean, visible; shifted gated two far', slice(None)),
        # A row that completes a chunk, and so chooses; and one beyond a border.
        ('mean, visible; shifted gated two far', slice(3, 4)),
        ('mean, visible; shifted gated two far', slice(4, 5)),
        # Which of many are best.
        ('mean, visible; far later', slice(None)),
        pytest.param('mean; far later', slice(3, 4), marks=pytest.mark.slow),
        pytest.param('mean; far', slice(None), marks=pytest.mark.slow),
        pytest.param('mean; far', slice(1, 2), marks=pytest.mark.slow),
        pytest.param('sum, su; gated far', slice(0, 1), marks=pytest.mark.slow),
        pytest.param('mean; shifted gated two', slice(None), marks=pytest.mark.slow),
        pytest.param('mean; shifted gated two', slice(1, 2), marks=pytest.mark.slow),
        pytest.param('sum, su; two', slice(None), marks=pytest.mark.slow),
        pytest.param('mean, visible; shifted', slice(None), marks=pytest.mark.slow),
        pytest.param('sum, su; gated', slice(None), marks=pytest.mark.slow),
        pytest.param('sum, su; gated', slice(0, 1), marks=pytest.mark.slow),
        *(
            pytest.param(case, rows, marks=pytest.mark.slow)
            for case in ('mean', 'sum, su')
            for rows in (slice(None), slice(0, 1), slice(1, 2))
        ),
    ],
)
def test_one_token_of_a_layer(case, rows, dtype):
    expect_the_token_of_the_reference(case, rows, dtype, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('rows', [slice(None), slice(3, 4), slice(4, 5)], ids=str)
@pytest.mark.parametrize('far', ['', ' far'])
def test_one_token_of_the_default_in_tiles_as_on_a_gpu(far, rows):
    expect_the_token_of_the_reference(f'mean, visible; shifted gated two{far}', rows, 'bfloat16', LARGE)


def expect_the_token_of_the_reference(case, rows, dtype, sizes):
    case, _, more = case.partition('; ')
    shifted, gated, far, chunks = 'shifted' in more, 'gated' in more, 'far' in more, 1 + ('two' in more)
    C, S, E, D = sizes
    # Rows in their first chunk, at its last token, and far on; beyond the border that their windows cross.
    all_opened_B = jnp.array([0, C - 7, 2 * C - 1, 3 * C - 6, 4 * C - 2])
    all_start_B = jnp.array([0, C - 1, 2 * C, 3 * C - 1, 4 * C + 1])
    # (In a window of two chunks, the second row beyond the border of the sequence's first chunk.)
    start_B, opened_B = (all_start_B if chunks == 1 else all_start_B.at[1].set(C))[rows], all_opened_B[rows]
    later = 36 if 'later' in more else 0
    start_B, opened_B, all_opened_B = (x + later * C for x in (start_B, opened_B, all_opened_B))
    spec = SPECS[case]._replace(chunk_size=C, window=chunks)
    position = DecodePosition(start_B, jnp.ones_like(start_B), opened_B)
    pairs = 4 + 2 * far
    shapes = [(), (D, 2, E), (2, E), (D, S), (S,), (pairs, S), (pairs, S), (E, D), (D,), (2 * chunks * C - 1,)]
    parameters = Parameters(*(0.5 * normal(20 + i, *shape) for i, shape in enumerate(shapes)))
    # So that sums over more columns are as large.
    less = (SMALL.width / D) ** 0.5
    matrices = {name: less * getattr(parameters, name) for name in ('uv_D2E', 'z_DS', 'out_ED')}
    parameters = parameters._replace(**matrices)
    if case == 'mean':
        parameters = parameters._replace(bias_P=None)
    table = rope_table(start_B[:, None], S) if case != 'mean' else None
    x_BD = normal(40, B, D)[rows]

    h_B1D = scale_norm(x_BD, parameters.norm, dtype='float64')[:, None]
    p_B1W = h_B1D @ parameters.uv_D2E.reshape(D, -1)
    u_B1E, v_B1E = gate_and_values(p_B1W, parameters.uv_bias_2E)
    z_B1S = jax.nn.silu(h_B1D @ parameters.z_DS + parameters.z_bias_S)
    keys_B1S = z_B1S
    if shifted:
        parameters = parameters._replace(mix_S=normal(41, S))
        keys_B1S = z_B1S + parameters.mix_S * (before('float64', sizes)[rows][:, None] - z_B1S)
    scales = zip(parameters.gamma_RS, parameters.beta_RS, strict=True)
    roles = [(keys_B1S if i % 2 else z_B1S) * gamma + beta for i, (gamma, beta) in enumerate(scales)]
    q, k, q_lin, k_lin, *far_pair = roles if table is None else (apply_rope(x, table) for x in roles)
    bias_B1M = None
    if parameters.bias_P is not None:
        bias_B1M = bias_matrix(parameters.bias_P, chunks * C, chunks * C)[(chunks - 1) * C + start_B % C][:, None]
    gate_B11, gate = None, {}
    if gated:
        parameters = parameters._replace(gate_D=less * normal(42, D), gate_bias=normal(43, 1))
        gate_B11 = (h_B1D @ parameters.gate_D + parameters.gate_bias)[..., None]
        # Nothing before the first chunk.
        count_B1 = jnp.where(chunks * C > all_opened_B, 0, 9.5 + all_opened_B)[:, None]
        gate = {'gate': normal(44, B, chunks * C + WINDOW, 1), 'count': count_B1}
    fields = {'position': position, 'spec': spec, 'gate_B11': gate_B11, 'bias_B1M': bias_B1M}
    av_B1E, wanted = window_token(
        *(q, k, q_lin, k_lin, v_B1E), cut(window_of('float64', chunks, sizes) | gate, rows), **fields
    )
    of_far = cut(far_window(6 + later, sizes), rows) if far else {}
    if far:
        far_B1E, wanted_far = chosen_chunks_token(*far_pair, v_B1E, of_far, position=position)
        av_B1E, wanted = av_B1E + far_B1E, wanted | wanted_far
    y_BD = x_BD + (u_B1E * av_B1E)[:, 0] @ parameters.out_ED + parameters.out_bias_D

    narrow = {
        name: x if x is None else x.astype(dtype if name in ('uv_D2E', 'z_DS', 'out_ED') else 'float32')
        for name, x in parameters._asdict().items()
    }
    table = None if table is None else tuple(x[:, 0].astype('float32') for x in table)
    window = window_of(dtype, chunks, sizes) | ({'before': before(dtype, sizes)} if shifted else {})
    window |= {name: x.astype('float32') for name, x in gate.items()}
    window = cut(window, rows) | far_narrow(of_far, dtype)
    found_BD, found = decode_gated_chunks(
        x_BD.astype(dtype), Parameters(**narrow), table, window, position=position, spec=spec
    )
    if shifted:
        expect_close(found['before'], z_B1S[:, 0], dtype, 'before')
    expect_close(found_BD, y_BD, dtype, 'y')
    for name in ('k', 'k_lin', 'v', *(['gate'] if gated else []), *of_far):
        if name != 'far_next':
            expect_close(found[name], wanted[name], dtype, name)
    if far:
        # As many as there are; what stands behind them is never read.
        counted_B1 = jnp.minimum((start_B + 1) // C, R)[:, None]
        for x in (found, wanted):
            x['far_next'] = jnp.where(jnp.arange(R) < counted_B1, x['far_next'], 0)
        np.testing.assert_array_equal(found['far_next'], wanted['far_next'])


def test_a_row_has_one_kernel_where_its_programs_fit_on_the_gpu_together(monkeypatch):
    monkeypatch.setattr(decode_row, 'interpreted', lambda: False)
    monkeypatch.setattr(decode_row, 'streaming_multiprocessors', lambda: 100)
    tiles = decode_row.row_tiles(768, 1536, 128)
    assert decode_row.row_programs(768, 1536, 128, tiles) == (96, 100)
    assert decode_row.row_tiles(1280, 2560, 128) is None
    monkeypatch.setattr(decode_row, 'streaming_multiprocessors', lambda: 99)
    assert decode_row.row_tiles(768, 1536, 128) is None


@pytest.mark.parametrize('dtype', BOTH_DTYPES)
@pytest.mark.parametrize(
    ('case', 'chunks', 'gated', 't'),
    [
        ('mean, visible', 2, True, 3 * C),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ('mean', 1, False, 3 * C),
                ('sum, su', 1, False, 3 * C),
                ('mean, visible', 1, True, 3 * C),
                ('mean, visible', 2, False, 3 * C),
                ('mean', 2, True, 3 * C),
                ('sum, su', 2, True, C),
            )
        ),
    ],
)
def test_a_block_of_a_prompt(case, chunks, gated, t, dtype):
    """Reads one chunk or two, with a gate or none."""
    spec = SPECS[case]._replace(window=chunks)
    # Rows begin a chunk or take nothing; they end in mid-chunk, with a chunk, with the block.
    start_B, length_B = jnp.array([0, 12, 36, 5, 24]), jnp.minimum(jnp.array([5, 24, 36, 0, 17]), t)
    position, places = DecodePosition(start_B, length_B), chunks * C
    q, k, q_lin, k_lin = (normal(50 + i, B, t, S) for i in range(4))
    p_BTW, bias_2E, bias_P = normal(54, B, t, 2 * E + S), normal(55, 2, E), normal(56, 2 * places - 1)
    u_BTE, v_BTE = gate_and_values(p_BTW, bias_2E)
    gate, gate_BT1 = {}, None
    if gated:
        gate_BT1 = normal(57, B, t, 1)
        count_B1 = jnp.where(start_B[:, None] < places, 0, 9.5)
        gate = {'gate': normal(58, B, places, 1), 'count': count_B1}
    wanted_BTE, wanted = mixed_chunk_block(
        *(q, k, q_lin, k_lin, v_BTE),
        state_of('float64', chunks) | gate,
        position=position,
        spec=spec,
        gate_BT1=gate_BT1,
        bias_CC=bias_matrix(bias_P, places, places),
    )
    arrays = [x.astype(dtype) for x in (p_BTW, q, k, q_lin, k_lin)]
    vectors = [x.astype('float32') for x in (bias_2E, bias_P)]
    fields = {'position': position, 'spec': spec, 'bias_P': vectors[1]}
    if gated:
        fields['gate_BT1'] = gate_BT1.astype('float32')
    state = state_of(dtype, chunks) | {name: x.astype('float32') for name, x in gate.items()}
    found_BTE, found = gated_mixed_chunk_block(*(arrays[0], vectors[0], *arrays[1:]), state, **fields)
    real = (jnp.arange(t) < length_B[:, None])[..., None]
    expect_close(jnp.where(real, found_BTE, 0), jnp.where(real, u_BTE * wanted_BTE, 0), dtype, 'o')
    for name in ('sum', 'count') if gated else ('sum',):
        expect_close(found[name], wanted[name], dtype, name)
    end_B, place_P = start_B + length_B, jnp.arange(places)
    filled = place_P < (places - C + end_B % C)[:, None]
    filled = (filled & (place_P >= (places - C - end_B // C * C)[:, None]))[..., None]
    for name in ('k', 'k_lin', 'v', *(('gate',) if gated else ())):
        expect_close(jnp.where(filled, found[name], 0), jnp.where(filled, wanted[name], 0), dtype, name)
