"""What devices compute on their own parts is what one computes alone (sharded_attention.py, sharded_loss.py)."""

import pytest

from tests.programs import report


@pytest.mark.slow
@pytest.mark.parametrize('cases', ['few', 'every'])
def test_sharded_tokens_give_the_same_values_and_gradients(cases):
    found = report('tests.layers.sharded_attention', cases)
    assert len(found) == {'few': 5, 'every': 72}[cases]
    for case, difference in found.items():
        assert difference < 1e-11, case


@pytest.mark.slow
def test_a_sum_over_devices_has_the_same_value_and_gradients():
    found = report('tests.layers.sharded_loss')
    assert len(found) == 5
    for case, difference in found.items():
        assert difference < 1e-13, case
