"""One token of quadratic attention in a kernel, over the filled places alone, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.decoding import DecodePosition, quadratic_block
from gau.ops.kernels import tile_sizes
from gau.ops.kernels.decode_cache import decode_with_cache
from gau.ops.scores import Scoring
from tests.numerics import max_error, normal
from tests.ops.kernels.conftest import DTYPES, TOLERANCE

CASES = {
    'softmax, parts': (Scoring('softmax', None), (2, 3, 70, 8, 8), 16, False),
    'softmax, one part, bias': (Scoring('softmax', None), (3, 1, 20, 6, 24), 64, True),
    'relu2, visible, bias': (Scoring('relu2', 'visible'), (2, 1, 70, 8, 40), 16, True),
    'relu2, su, heads': (Scoring('relu2', 'su'), (2, 2, 33, 5, 20), 16, False),
}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', CASES)
def test_the_filled_places_are_read_and_no_others(case, dtype, monkeypatch):
    scoring, (batch, heads, capacity, inner, width), block_m, with_bias = CASES[case]
    tiles = tile_sizes.DECODE_CACHE._replace(block_m=block_m, block_e=16, min_programs=1)
    monkeypatch.setattr(tile_sizes, 'DECODE_CACHE', tiles._replace(most_blocks=2))
    # Nothing but the token itself; in the middle; the last place, or beyond it.
    start_B = jnp.asarray([0, capacity - 1, capacity // 2][:batch])
    position = DecodePosition(start_B, jnp.ones_like(start_B))
    q, k, v = (normal(i, batch, heads, 1, size) for i, size in enumerate((inner, inner, width)))
    filled_B1M1 = (jnp.arange(capacity) < start_B[:, None])[:, None, :, None]
    # What stands at empty places must not be read: not a number times 0 is none.
    k_state, v_state = (
        jnp.where(filled_B1M1, normal(i, batch, heads, capacity, size), jnp.nan) for i, size in ((3, inner), (4, width))
    )
    bias_HB1M = normal(5, heads, batch, 1, capacity) if with_bias else None

    def reference(q, k, v, k_state, v_state, bias):
        state = {'k': jnp.nan_to_num(k_state), 'v': jnp.nan_to_num(v_state)}
        return quadratic_block(q, k, v, state, position=position, scoring=scoring, bias_BTM=bias)

    axes = (1, 1, 1, 1, 1, None if bias_HB1M is None else 0)
    wanted, state = jax.vmap(reference, in_axes=axes, out_axes=1)(q, k, v, k_state, v_state, bias_HB1M)
    narrow = [x.astype(dtype) for x in (q, k, v, k_state, v_state)]
    found, new = decode_with_cache(
        *narrow[:3],
        dict(zip(('k', 'v'), narrow[3:], strict=True)),
        position=position,
        scoring=scoring,
        bias_HB1M=bias_HB1M,
    )
    assert max_error(np.asarray(found, np.float64), np.asarray(wanted)) < TOLERANCE[dtype]
    for name in ('k', 'v'):
        here = jnp.broadcast_to(jnp.arange(capacity) <= start_B[:, None], (batch, capacity))[:, None, :, None]
        a, b = (np.asarray(jnp.where(here, x, 0), np.float64) for x in (new[name], state[name]))
        assert max_error(a, b) < TOLERANCE[dtype]
