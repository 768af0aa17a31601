import pytest
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.training.durations import in_steps


def steps(total_steps=None, **fields):
    section = ConfigDict({'steps': None, 'tokens': None, 'epochs': None, 'percent': None, **fields})
    return in_steps(section, tokens_per_step=100, tokens_per_epoch=lambda: 1050, total_steps=total_steps)


def test_units_round_up():
    assert steps(steps=7) == 7
    assert steps(tokens=101) == 2
    assert steps(epochs=2.0) == 21
    assert steps(percent=2.5, total_steps=1000) == 25
    assert steps(percent=7.0, total_steps=100) == 7  # 7 / 100 * 100 is more than 7 in floats
    assert steps(epochs=1.2) == 13  # 12.6, rounded up
    assert steps(epochs=2.2) == 24  # 23.1


OUT_OF_RANGE = [{'steps': -1}, {'epochs': float('nan')}, {'epochs': float('inf')}, {'epochs': 1e308}]


@pytest.mark.parametrize('fields', [{}, {'steps': 3, 'tokens': 5}, *OUT_OF_RANGE], ids=str)
def test_exactly_one_and_a_number_of_steps(fields):
    with pytest.raises(UserError, match=r'exactly one|negative|want a number below'):
        steps(**fields)


def test_percent_needs_a_total():
    with pytest.raises(UserError, match='exactly one of steps, tokens, epochs'):
        steps(percent=3.0)
