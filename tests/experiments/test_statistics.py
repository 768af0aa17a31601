import math

import numpy as np
import pytest
from scipy import stats

from gau.experiments import statistics

UNKNOWN = statistics.Sigma(None, 0)


def test_interval_is_the_textbook_one():
    found = statistics.mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert statistics.mean([5.0]) == (5.0, None, 1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(3.0, 0.2, size=(2000, 4))
    covered = [abs(mean.value - 3.0) <= mean.half for mean in map(statistics.mean, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_sigma_is_pooled_within_cells():
    sigma = statistics.pooled_sigma([[1.0, 3.0], [11.0, 12.0, 13.0], [7.0]])
    assert sigma == (pytest.approx(math.sqrt((2 + 2) / 3)), 3)
    assert statistics.pooled_sigma([[1.0], [2.0]]) == (None, 0)


def test_a_single_run_is_compared_by_the_spread_of_its_table():
    # Six degrees of freedom from three cells of three; a single run of none of them, and the first of them.
    draws = np.random.default_rng(0).normal(3.0, 0.2, size=(2000, 10))
    found = [
        statistics.compare({0: draw[9]}, dict(enumerate(draw[:3])), statistics.pooled_sigma(draw[:9].reshape(3, 3)))
        for draw in draws
    ]
    within = [abs(comparison.difference.value) <= comparison.difference.half for comparison in found]
    assert np.mean(within) == pytest.approx(0.95, abs=0.015)
    assert np.mean([comparison.p > 0.05 for comparison in found]) == np.mean(within)
    assert str(found[0]).endswith('(n=1, 3)')


def test_of_two_cells_the_means_are_compared_as_in_the_textbook():
    cells = [[1.0, 1.2, 1.7], [2.0, 2.4, 2.5, 2.9]]
    sigma = statistics.pooled_sigma(cells)
    found = statistics.compare(dict(enumerate(cells[0])), {9 + i: x for i, x in enumerate(cells[1])}, sigma)
    assert found.p == pytest.approx(stats.ttest_ind(*cells).pvalue)
    assert not found.paired


def test_pairs_are_matched_by_seed():
    baseline = {0: 3.0, 1: 3.5, 2: 4.0, 9: 1.0}
    cell = {2: 3.92, 0: 2.9, 1: 3.39, 7: 8.0}
    found = statistics.compare(cell, baseline, UNKNOWN)
    assert found.difference.value == pytest.approx(-0.29 / 3)
    assert found.difference.n == 3
    assert found.p == pytest.approx(stats.ttest_1samp([-0.1, -0.11, -0.08], 0).pvalue)
    # Unpaired, the same numbers say nothing: that is why runs share seeds.
    assert stats.ttest_ind([2.9, 3.39, 3.92], [3.0, 3.5, 4.0]).pvalue > 0.5 > found.p


def test_pairs_at_the_edge():
    assert statistics.compare({0: 1.0}, {1: 1.0}, UNKNOWN) is None
    assert statistics.compare({0: 1.0}, {0: 2.0}, UNKNOWN).p is None
    assert statistics.compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, UNKNOWN).p == 1.0
    assert statistics.compare({0: 1.0}, {0: 1.0}, statistics.Sigma(0.0, 4)).p == 1.0
    assert statistics.compare({0: 1.0}, {0: 2.0}, statistics.Sigma(0.0, 4)).p == 0.0
    assert statistics.compare({0: 1.0}, {0: 2.0}, statistics.Sigma(0.1, 3)).p is None


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_digits_follow_the_interval():
    assert str(statistics.Mean(3.63012, 0.00412, 3)) == '3.6301 ± 0.0041 (n=3)'
    assert str(statistics.Mean(3.63012, 0.412, 3)) == '3.630 ± 0.412 (n=3)'
    assert statistics.Mean(0.5, None, 1).format('+') == '+0.5000 (n=1)'
