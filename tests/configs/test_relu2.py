"""configs/relu2.py: every point of its sweeps is accepted."""

import pytest

from gau.experiments.sweep import Program, find_points
from tests.conftest import ROOT


@pytest.mark.parametrize(('sweep', 'points'), [('models+rate,seed:3', 15), ('trials', 16), ('mlm', 4)])
def test_every_point_is_accepted(sweep, points):
    found = find_points(Program(str(ROOT / 'configs' / 'relu2.py'), 'data=embedded'), sweep)
    assert [point.error for point in found] == [''] * points
