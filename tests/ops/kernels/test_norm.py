"""ScaleNorm of the residual stream in kernels against the plain formula in float64, values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops.kernels import norm, tile_sizes
from gau.ops.norms import scale_norm
from tests.numerics import max_error
from tests.ops.kernels.conftest import TOLERANCE


def reference(x, bias, g, gate, dtype):
    h = scale_norm(x if bias is None else x + bias, g, dtype=dtype)
    return x, h, None if gate is None else (h @ gate)[..., None]


def results_and_gradients(op, dtype, arrays, weights, present):
    """The results, and the gradients of x, bias, g and gate, without those that are not `present`."""

    def f(*operands):
        given = dict(zip(present, operands, strict=True))
        results = [x for x in op(*(given.get(name) for name in ('x', 'bias', 'g', 'gate')), dtype) if x is not None]
        return sum(jnp.sum(a * w.astype(a.dtype)) for a, w in zip(results, weights, strict=False)), results

    wide = 'float64' if dtype == 'float64' else 'float32'
    operands = [arrays[name].astype(dtype if name in ('x', 'gate') else wide) for name in present]
    (_, results), gradients = jax.jit(jax.value_and_grad(f, range(len(present)), has_aux=True))(*operands)
    assert [a.dtype for a in gradients] == [a.dtype for a in operands]
    return results, gradients


# No product is in these kernels, so the interpreter has bfloat16 too.
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('present', ['x bias g', 'x g', 'x bias g gate', 'x g gate'])
@pytest.mark.parametrize('shape', [(2, 5, 24), (1, 67, 130), (2, 8, 128)])
def test_values_and_all_gradients(shape, present, dtype, monkeypatch):
    # Few programs, so that each has several tiles of rows, and not all as many.
    monkeypatch.setattr(tile_sizes, 'NORM', tile_sizes.NORM._replace(numbers=512))
    gradient = tile_sizes.NORM_GRADIENT._replace(numbers=512, max_programs=3)
    monkeypatch.setattr(tile_sizes, 'NORM_GRADIENT', gradient)
    monkeypatch.setattr(tile_sizes, 'NORM_GRADIENT_GATE', gradient)
    generator = np.random.default_rng(0)
    shapes = {'x': shape, 'bias': shape[-1:], 'g': (), 'gate': shape[-1:]}
    # Rounded to begin with, so that both compute the same.
    arrays = {name: jnp.asarray(generator.standard_normal(size)).astype(dtype) for name, size in shapes.items()}
    shapes = shape, shape, (*shape[:-1], 1)
    weights = [jnp.asarray(generator.standard_normal(size)).astype(dtype) for size in shapes]
    found = results_and_gradients(norm.scale_norm_of_residual, dtype, arrays, weights, present.split())
    expected = results_and_gradients(reference, 'float64', arrays, weights, present.split())
    assert [a.dtype.name for a in found[0]] == [dtype, dtype, 'float32'][: len(found[0])]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE[dtype]


def test_what_is_normalised_is_the_sum_in_float32():
    x, bias = jnp.full((1, 1, 16), 256, 'bfloat16'), jnp.arange(16, dtype='float32') / 16
    # In bfloat16 256 plus less than 1 is 256.
    _, h, _ = norm.scale_norm_of_residual(x, bias, jnp.float32(2), None, 'float32')
    np.testing.assert_allclose(h, reference(x.astype('float64'), bias, jnp.float64(2), None, 'float64')[1], rtol=1e-6)
    assert len(np.unique(h)) == 16
