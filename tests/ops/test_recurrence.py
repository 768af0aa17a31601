"""Linear recurrences in blocks against one step after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import recurrence as module
from gau.ops.recurrence import recurrence


@pytest.mark.parametrize('groups', [1, 2, 3, 4, 18])
@pytest.mark.parametrize('reverse', [False, True])
def test_values_and_gradients(groups, reverse, monkeypatch):
    # Blocks of blocks of blocks.
    monkeypatch.setattr(module, 'BLOCK', 4)
    monkeypatch.setattr(module, 'FEW', 2)
    keys = jax.random.split(jax.random.key(groups), 3)
    factor, x, dy = (jax.random.normal(key, (2, groups, 3), jnp.float64) for key in keys)
    # Where it begins anew.
    factor = jnp.where(factor < -1, 0, jnp.tanh(factor))

    def step_by_step(factor, x):
        steps = (jnp.moveaxis(array, 1, 0) for array in (factor, x))

        def step(y, now):
            y = now[0] * y + now[1]
            return y, y

        return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(x[:, 0]), tuple(steps), reverse=reverse)[1], 0, 1)

    wanted, pull = jax.vjp(step_by_step, factor, x)
    found, pull_found = jax.vjp(lambda *args: recurrence(*args, reverse), factor, x)
    for a, b in zip((found, *pull_found(dy)), (wanted, *pull(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
