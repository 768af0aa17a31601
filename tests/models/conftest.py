import jax
import pytest

from tests.numerics import float64


@pytest.fixture(autouse=True)
def _exact():
    # A GPU would else round the factors of float32 matmuls.
    with float64(), jax.default_matmul_precision('highest'):
        yield
