"""What the tests of the kernels share. On a CPU kernels run in Triton's interpreter, on a GPU as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.numerics import max_error

pytest.importorskip('triton')

# What holds for float32 in the interpreter holds for bfloat16 but for its rounding: there few tests take both.
DTYPES = ['float32', 'bfloat16'] if jax.default_backend() == 'gpu' else ['float32']
BOTH_DTYPES = ['float32', pytest.param('bfloat16', marks=() if jax.default_backend() == 'gpu' else pytest.mark.slow)]
# Largest difference, of the largest number.
TOLERANCE = {'float32': 2e-5, 'bfloat16': 2e-2}
# Before silu, and as good as 0 after it; and a large one.
GATES = ((0.0, -0.0, -70.0, -500.0), (500.0,))


@pytest.fixture(autouse=True)
def _full_precision():
    # The library's products around the kernels: a GPU would else round float32 to TF32.
    with jax.default_matmul_precision('highest'):
        yield


def documents(n):
    """Segment ids [2, n]: documents that end inside chunks and one that spans several, with padding at two places."""
    first = np.repeat([1, 2, 3, 4], [3, n // 2, n // 8, n - 3 - n // 2 - n // 8])
    first[-(n // 8) :] = 0
    second = np.repeat([7, 0, 5, 6], [n // 3, n // 6, 2, n - 2 - n // 3 - n // 6])
    return jnp.asarray(np.stack([first, second]), jnp.int32)


# Segment ids of n tokens, or None.
SEGMENT_LAYOUTS = {
    'none': lambda n: None,
    'documents': documents,
    'one row': lambda n: documents(n)[1:],
    # Of one and of two tokens.
    'short': lambda n: 1 + jnp.stack([jnp.arange(n), jnp.arange(n) // 2]),
    # Chunks of nothing else, within a document, before one, and at the end.
    'padding': lambda n: jnp.where(jnp.asarray([[1] * n, [0] * n]) == jnp.arange(n) // (n // 4) % 2, 0, 3),
}


def expect_gates_to_have_their_gradient(gates, p, args, compare, names):
    """Checks that gates of exactly 0, or as good as 0, by which kernels divide o, have the gradient they should have.

    Args:
      gates: what every third token's gate is before silu, in turn, its bias being 0.
      p: which of `args`, float64, has the projections, of 24 columns for the gate.
      args: of the op.
      compare: from float64 arguments to what is wanted and what the kernels find in float32: the output and all
        gradients of each.
      names: of output and arguments.
    """
    args = list(args)
    gates = np.resize(gates, len(range(0, args[p].shape[1], 3)))
    args[p] = args[p].at[:, ::3, :24].set(gates[:, None])
    args[p + 1] = jnp.zeros_like(args[p + 1])
    wanted, found = compare(args)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert max_error(np.asarray(a, np.float64), np.asarray(b)) < TOLERANCE['float32'], name
    found, wanted = (np.asarray(x[1 + p][:, ::3, :24], np.float64) for x in (found, wanted))
    assert np.abs(found - wanted).max() < 2e-5 * max(1, np.abs(wanted).max())
    assert np.abs(found[:, gates >= -1]).min() > 0
