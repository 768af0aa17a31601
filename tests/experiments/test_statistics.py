import math

import numpy as np
import pytest
from scipy import stats

from gau.experiments import statistics


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


def test_two_single_runs_are_as_far_apart_as_their_table_says():
    draws = np.random.default_rng(0).normal(3.0, 0.2, size=(2000, 9))
    # Six degrees of freedom from three cells of three; then two runs that are in none of them.
    apart = np.diff(np.random.default_rng(1).normal(3.0, 0.2, size=(2000, 2)))[:, 0]
    sigmas = [statistics.pooled_sigma(draw.reshape(3, 3)) for draw in draws]
    within = [abs(distance) <= sigma.between_two() for distance, sigma in zip(apart, sigmas, strict=True)]
    assert np.mean(within) == pytest.approx(0.95, abs=0.015)
    assert statistics.pooled_sigma([[1.0, 2.0], [1.0, 2.0]]).between_two() is None
    assert statistics.pooled_sigma([[1.0]]).between_two() is None


def test_pairs_are_matched_by_seed():
    baseline = {0: 3.0, 1: 3.5, 2: 4.0, 9: 1.0}
    cell = {2: 3.92, 0: 2.9, 1: 3.39, 7: 8.0}
    found = statistics.paired(cell, baseline)
    assert found.difference.value == pytest.approx(-0.29 / 3)
    assert found.difference.n == 3
    assert found.p == pytest.approx(stats.ttest_1samp([-0.1, -0.11, -0.08], 0).pvalue)
    # Unpaired, the same numbers say nothing: that is why runs share seeds.
    assert stats.ttest_ind([2.9, 3.39, 3.92], [3.0, 3.5, 4.0]).pvalue > 0.5 > found.p


def test_pairs_at_the_edge():
    assert statistics.paired({0: 1.0}, {1: 1.0}) is None
    assert statistics.paired({0: 1.0}, {0: 2.0}).p is None
    assert statistics.paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).p == 1.0


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_digits_follow_the_interval():
    assert str(statistics.Mean(3.63012, 0.00412, 3)) == '3.6301 ± 0.0041 (n=3)'
    assert str(statistics.Mean(3.63012, 0.412, 3)) == '3.630 ± 0.412 (n=3)'
    assert statistics.Mean(0.5, None, 1).format('+') == '+0.5000 (n=1)'
