"""The gradient of ScaleNorm and the stream around it against the plain formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.kernels.norm import stream_and_scale_norm
from gau.ops.norms import scale_norm
from tests.numerics import max_error
from tests.ops.kernels.conftest import DTYPES, TOLERANCE


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(2, 5, 24), (1, 67, 130)])
def test_values_and_all_gradients(dtype, shape):
    generator = np.random.default_rng(0)
    x, to_stream, to_y, to_again = (jnp.asarray(generator.standard_normal(shape)) for _ in range(4))

    def loss(norm, dtype):
        def f(x, g):
            stream, y, again = norm(x.astype(dtype), g)
            weights = (w.astype(dtype) for w in (to_stream, to_y, to_again))
            return sum(jnp.sum(a * w) for a, w in zip((stream, y, again), weights, strict=True)), y

        args = (x, jnp.asarray(1.7)) if dtype == 'float64' else (x.astype('float32'), jnp.float32(1.7))
        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*args)

    (_, y), gradients = loss(lambda x, g: stream_and_scale_norm(x, g, dtype), dtype)
    (_, expected_y), expected = loss(lambda x, g: (x, *[scale_norm(x, g, dtype='float64')] * 2), 'float64')
    for a, b in zip((y, *gradients), (expected_y, *expected), strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype]
