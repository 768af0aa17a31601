import pytest

from tests.numerics import float64


@pytest.fixture(autouse=True)
def _float64():
    with float64():
        yield
