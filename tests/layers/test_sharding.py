"""Attention on parts of a sequence equals attention on all of it (see sharded_attention.py)."""

import pytest

from tests.programs import report


@pytest.mark.parametrize('cases', ['few', pytest.param('every', marks=pytest.mark.slow)])
def test_sharded_tokens_give_the_same_values_and_gradients(cases):
    found = report('tests.layers.sharded_attention', cases)
    assert len(found) == {'few': 4, 'every': 64}[cases]
    for case, difference in found.items():
        assert difference < 1e-11, case
