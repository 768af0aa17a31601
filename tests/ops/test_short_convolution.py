"""The short convolution against loops over tokens, and block by block as it is decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.short_convolution import short_convolution, short_convolution_block
from tests.numerics import max_error, normal

B, N, D = 2, 7, 3
IDS = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 3, 3, 3]])


def by_loops(x_BND, weights_WD, ids_BN, causal):
    w = len(weights_WD)
    offsets = range(1, w + 1) if causal else [*range(1, w // 2 + 1), *range(-1, -w // 2 - 1, -1)]
    y_BND = np.array(x_BND)
    for b, n in np.ndindex(B, N):
        for offset, weights_D in zip(offsets, weights_WD, strict=True):
            other = n - offset
            if 0 <= other < N and (ids_BN is None or ids_BN[b, other] == ids_BN[b, n] > 0):
                y_BND[b, n] += weights_D * x_BND[b, other]
    return y_BND


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('ids_BN', [None, IDS], ids=['one document', 'documents'])
@pytest.mark.parametrize('w', [4, 10])
def test_it_is_the_sum_over_neighbours(w, ids_BN, causal):
    x_BND, weights_WD = normal(0, B, N, D), normal(1, w, D)
    y_BND = short_convolution(x_BND, weights_WD, ids_BN, causal=causal)
    assert max_error(y_BND, by_loops(x_BND, weights_WD, ids_BN, causal)) < 1e-14
    y_BND = short_convolution(x_BND.astype('bfloat16'), weights_WD.astype('float32'), ids_BN, causal=causal)
    assert y_BND.dtype == jnp.bfloat16
    # By gradient: what a token reads.
    reads_NN = jax.jacobian(lambda x: short_convolution(x, weights_WD, ids_BN, causal=causal)[1].sum(-1))(x_BND)
    reads_NN = (reads_NN[:, 1] != 0).any(-1)
    distance_NN = np.arange(N)[:, None] - np.arange(N)
    wanted_NN = (distance_NN >= 0) & (distance_NN <= w) if causal else abs(distance_NN) <= w // 2
    if ids_BN is not None:
        wanted_NN &= np.asarray(ids_BN[1][:, None] == ids_BN[1])
    np.testing.assert_array_equal(reads_NN, wanted_NN)


def test_padding_of_any_value_is_not_read():
    x_BND = normal(0, B, N, D).at[0, 5:].set(jnp.nan)
    y_BND = short_convolution(x_BND, normal(1, 4, D), IDS, causal=False)
    assert jnp.isfinite(y_BND[IDS > 0]).all()


def test_blocks_of_rows_of_different_lengths_are_the_whole():
    x_BND, weights_WD = normal(0, B, N, D), normal(1, 3, D)
    whole_BND = short_convolution(x_BND, weights_WD)
    before_BWD, at_B = jnp.zeros((B, 3, D)), np.zeros(B, int)
    for lengths in ([1, 0], [2, 4], [0, 1], [4, 2]):
        # What stands behind a row's tokens must not matter.
        rows = [x[n : n + t] for x, n, t in zip(x_BND, at_B, lengths, strict=True)]
        block_BTD = jnp.stack([jnp.pad(x, ((0, 4 - len(x)), (0, 0)), constant_values=9) for x in rows])
        y_BTD, before_BWD = short_convolution_block(block_BTD, weights_WD, before_BWD, jnp.asarray(lengths))
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(y_BTD[b, :length], whole_BND[b, at_B[b] : at_B[b] + length], rtol=0, atol=1e-14)
        at_B += lengths
    np.testing.assert_array_equal(at_B, N)
