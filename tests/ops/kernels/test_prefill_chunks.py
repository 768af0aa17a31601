"""A block of a prompt in FLASH's layer, in kernels, against the reference."""

import jax
import jax.numpy as jnp
import pytest

from gau.ops.decoding import DecodePosition, mixed_chunk_block
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.decode_chunks import Parameters
from gau.ops.kernels.prefill_chunks import prefill_gated_chunks
from gau.ops.norms import scale_norm
from gau.ops.positions import apply_rope, bias_matrix, rope_table
from gau.ops.quadratic_attention import gate_and_values
from tests.numerics import normal
from tests.ops.kernels.conftest import BOTH_DTYPES
from tests.ops.kernels.test_decode_chunks import LARGE, SMALL, SPECS, B, before, expect_close, state_of


@pytest.mark.parametrize('dtype', BOTH_DTYPES)
@pytest.mark.parametrize(
    ('case', 'reader'),
    [
        ('mean, visible; shifted gated two', 'long'),
        *(
            pytest.param(case, reader, marks=pytest.mark.slow)
            for case, reader in (
                ('mean, visible; shifted gated two', 'short'),
                ('mean', 'short'),
                ('sum, su', 'short'),
                ('mean, visible; shifted gated', 'short'),
                ('sum, su; gated', 'short'),
                ('mean; gated two', 'short'),
                ('mean', 'long'),
                ('sum, su; two', 'long'),
                ('mean, visible; two', 'long'),
                ('sum, su; gated', 'long'),
                ('mean; gated two', 'long'),
            )
        ),
    ],
)
def test_a_block_of_a_layer(case, reader, dtype, monkeypatch):
    # A long block is cut into parts of two chunks and one, or not at all.
    least = {'block_e': 32, 'num_warps': 4, 'min_warps': 1 if case.split('; ')[0] == 'mean' else 120}
    tiles = {name: tiles._replace(**least) for name, tiles in tile_sizes.PREFILL_STATES.items()}
    monkeypatch.setattr(tile_sizes, 'PREFILL_STATES', tiles)
    expect_the_reference(case, reader, dtype, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize('reader', ['short', 'long'])
def test_a_block_of_the_default_in_tiles_as_on_a_gpu(reader):
    expect_the_reference('mean, visible; shifted gated two', reader, 'bfloat16', LARGE)


def expect_the_reference(case, reader, dtype, sizes):
    case, _, more = case.partition('; ')
    shifted, gated, chunks = 'shifted' in more, 'gated' in more, 1 + ('two' in more)
    C, S, E, D = sizes
    spec, groups = SPECS[case]._replace(chunk_size=C, window=chunks), 3 if reader == 'short' else 5
    t = groups * C
    # Rows begin a chunk or take nothing; they end in mid-chunk, with a chunk, with the block.
    start_B, length_B = jnp.array([0, C, 3 * C, 5, 2 * C]), jnp.array([5, 2 * C, t, 0, C + 5])
    if chunks == 2 and reader == 'short':
        start_B = jnp.where(length_B > 0, 0, start_B)
    position = DecodePosition(start_B, length_B, reader=reader)
    shapes = [(), (D, 2, E), (2, E), (D, S), (S,), (4, S), (4, S), (E, D), (D,), (2 * chunks * C - 1,)]
    parameters = Parameters(*(0.5 * normal(20 + i, *shape) for i, shape in enumerate(shapes)))
    # So that sums over more columns are as large.
    less = (SMALL.width / D) ** 0.5
    matrices = {name: less * getattr(parameters, name) for name in ('uv_D2E', 'z_DS', 'out_ED')}
    parameters = parameters._replace(**matrices)
    if case == 'mean':
        parameters = parameters._replace(bias_P=None)
    table = rope_table(position.positions_BT(t), S) if case != 'mean' else None
    x_BTD = normal(40, B, t, D)
    old = state_of('float64', chunks, sizes)
    # A sequence that begins has a state of zeros.
    old = {name: jnp.where((start_B > 0)[:, None, None], x, 0) for name, x in old.items()}
    in_sum_B = start_B >= chunks * C
    old['sum'] = jnp.where(in_sum_B[:, None, None], old['sum'], 0)

    h_BTD = scale_norm(x_BTD, parameters.norm, dtype='float64')
    u_BTE, v_BTE = gate_and_values(h_BTD @ parameters.uv_D2E.reshape(D, -1), parameters.uv_bias_2E)
    z_BTS = jax.nn.silu(h_BTD @ parameters.z_DS + parameters.z_bias_S)
    keys_BTS = z_BTS
    if shifted:
        parameters = parameters._replace(mix_S=normal(41, S))
        old['before'] = jnp.where((start_B > 0)[:, None], before('float64', sizes), 0)
        before_BTS = jnp.concatenate([old['before'][:, None], z_BTS[:, :-1]], axis=1)
        keys_BTS = z_BTS + parameters.mix_S * (before_BTS - z_BTS)
    scales = zip(parameters.gamma_RS, parameters.beta_RS, strict=True)
    roles = [(keys_BTS if i % 2 else z_BTS) * gamma + beta for i, (gamma, beta) in enumerate(scales)]
    roles = roles if table is None else [apply_rope(x, table) for x in roles]
    bias_CC = None if parameters.bias_P is None else bias_matrix(parameters.bias_P, chunks * C, chunks * C)
    gate_BT1 = None
    if gated:
        parameters = parameters._replace(gate_D=less * normal(42, D), gate_bias=normal(43, 1))
        gate_BT1 = (h_BTD @ parameters.gate_D + parameters.gate_bias)[..., None]
        old |= {'gate': normal(44, B, chunks * C, 1), 'count': jnp.where(in_sum_B, 9.5 + start_B, 0)[:, None]}
    fields = {'position': position, 'spec': spec, 'gate_BT1': gate_BT1, 'bias_CC': bias_CC}
    av_BTE, wanted = mixed_chunk_block(*roles, v_BTE, old, **fields)
    y_BTD = x_BTD + (u_BTE * av_BTE) @ parameters.out_ED + parameters.out_bias_D

    narrow = {
        name: x if x is None else x.astype(dtype if name in ('uv_D2E', 'z_DS', 'out_ED') else 'float32')
        for name, x in parameters._asdict().items()
    }
    table = None if table is None else tuple(x.astype('float32') for x in table)
    state = {name: x.astype('float32' if name in ('sum', 'gate', 'count') else dtype) for name, x in old.items()}
    found_BTD, found = prefill_gated_chunks(
        x_BTD.astype(dtype), Parameters(**narrow), table, state, position=position, spec=spec
    )
    if shifted:
        last_BS = jnp.take_along_axis(z_BTS, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]
        wanted_BS = jnp.where((length_B > 0)[:, None], last_BS, old['before'])
        expect_close(found['before'], wanted_BS, dtype, 'before')
    real = (jnp.arange(t) < length_B[:, None])[..., None]
    expect_close(jnp.where(real, found_BTD, 0), jnp.where(real, y_BTD, 0), dtype, 'y')
    expect_close(found['sum'], wanted['sum'], dtype, 'sum')
    if gated:
        expect_close(found['count'], wanted['count'], dtype, 'count')
    end_B, place_P = start_B + length_B, jnp.arange(chunks * C)
    own_B1 = ((chunks - 1) * C + end_B % C)[:, None]
    filled = ((place_P < own_B1) & (place_P >= own_B1 - end_B[:, None]))[..., None]
    for name in ('k', 'k_lin', 'v', *(['gate'] if gated else [])):
        expect_close(jnp.where(filled, found[name], 0), jnp.where(filled, wanted[name], 0), dtype, name)
