import math

import jax.numpy as jnp
import pytest

from tests.numerics import max_error


@pytest.mark.parametrize('position', [0, 1, 2])
def test_a_nan_in_any_leaf_is_an_error(position):
    right = [jnp.ones(2), jnp.ones(3), jnp.ones(1)]
    wrong = [x.at[0].set(jnp.nan) if i == position else x for i, x in enumerate(right)]
    assert math.isnan(max_error(wrong, right))
    assert math.isnan(max_error(right, wrong))
    assert max_error(right, [2 * x for x in right]) == 0.5
