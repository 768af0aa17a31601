from collections.abc import Callable

import pytest

from tests.numerics import float64


@pytest.fixture(autouse=True)
def _float64():
    with float64():
        yield


@pytest.fixture
def constants(monkeypatch) -> Callable[..., None]:
    """Returns set(op, module, NAME=value): for this test, and for what `op` is traced with in it and after it."""
    ops = []

    def set_constants(op, module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
        op.clear_cache()
        ops.append(op)

    yield set_constants
    monkeypatch.undo()
    for op in ops:
        op.clear_cache()
