import math

import numpy as np
import pytest
from scipy import stats

from gau.experiments import statistics
from gau.experiments.statistics import Judge

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


def test_few_seeds_have_the_interval_of_their_table():
    # Nine cells of two seeds: nine degrees of freedom.
    draws = np.random.default_rng(1).normal(3.0, 0.2, size=(2000, 9, 2))
    found = [statistics.mean_of_cell(cells[0], statistics.pooled_sigma(cells)) for cells in draws]
    assert np.mean([abs(mean.value - 3.0) <= mean.half for mean in found]) == pytest.approx(0.95, abs=0.015)
    sigma = statistics.Sigma(0.2, 9)
    assert statistics.mean_of_cell([5.0], sigma).half == pytest.approx(stats.t.ppf(0.975, 9) * 0.2)
    assert statistics.mean_of_cell([1.0, 2.0, 3.0], sigma) == statistics.mean([1.0, 2.0, 3.0])
    assert statistics.mean_of_cell([1.0, 2.0], statistics.Sigma(0.2, 3)) == statistics.mean([1.0, 2.0])
    assert statistics.mean_of_cell([math.inf], sigma).half is None


def test_a_single_run_is_compared_by_the_spread_of_its_table():
    # Six degrees of freedom from three cells of three; a single run of none of them, and the first of them.
    draws = np.random.default_rng(0).normal(3.0, 0.2, size=(2000, 10))
    found = [
        statistics.compare(
            {0: draw[9]}, dict(enumerate(draw[:3])), statistics.pooled_sigma(draw[:9].reshape(3, 3)), UNKNOWN
        )
        for draw in draws
    ]
    within = [abs(comparison.difference.value) <= comparison.difference.half for comparison in found]
    assert np.mean(within) == pytest.approx(0.95, abs=0.015)
    assert np.mean([comparison.p > 0.05 for comparison in found]) == np.mean(within)
    assert found[0].judge is Judge.MEANS
    assert (found[0].shared, found[0].smaller) == (1, 1)


def test_of_two_cells_the_means_are_compared_as_in_the_textbook():
    cells = [[1.0, 1.2, 1.7], [2.0, 2.4, 2.5, 2.9]]
    sigma = statistics.pooled_sigma(cells)
    found = statistics.compare(dict(enumerate(cells[0])), {9 + i: x for i, x in enumerate(cells[1])}, sigma, UNKNOWN)
    assert found.p == pytest.approx(stats.ttest_ind(*cells).pvalue)
    assert (found.judge, found.shared, found.smaller) == (Judge.MEANS, 0, 3)


def test_pairs_are_matched_by_seed():
    baseline = {0: 3.0, 1: 3.5, 2: 4.0, 9: 1.0}
    cell = {2: 3.92, 0: 2.9, 1: 3.39, 7: 8.0}
    found = statistics.compare(cell, baseline, UNKNOWN, statistics.Sigma(9.0, 9))
    assert found.judge is Judge.PAIRS
    assert found.difference.value == pytest.approx(-0.29 / 3)
    assert found.difference.n == 3
    assert found.p == pytest.approx(stats.ttest_1samp([-0.1, -0.11, -0.08], 0).pvalue)
    # Unpaired, the same numbers say nothing: that is why runs share seeds.
    assert stats.ttest_ind([2.9, 3.39, 3.92], [3.0, 3.5, 4.0]).pvalue > 0.5 > found.p


# By Montgomery, Design and Analysis of Experiments: vascular grafts, four pressures in six blocks of resin; a catalyst,
# four of them in four blocks of three.
BLOCKS = {
    'complete': (
        [
            dict(enumerate([90.3, 89.2, 98.2, 93.9, 87.4, 97.9])),
            dict(enumerate([92.5, 89.5, 90.6, 94.7, 87.0, 95.8])),
            dict(enumerate([85.5, 90.8, 89.6, 86.2, 88.0, 93.4])),
            dict(enumerate([82.5, 89.5, 85.6, 87.4, 78.9, 90.7])),
        ],
        7.33,
        15,
    ),
    'incomplete': (
        [{1: 73, 2: 74, 4: 71}, {2: 75, 3: 67, 4: 72}, {1: 73, 2: 75, 3: 68}, {1: 75, 3: 72, 4: 75}],
        0.65,
        5,
    ),
}


@pytest.mark.parametrize('name', BLOCKS)
def test_residual_of_rows_and_seeds_is_that_of_the_textbook(name):
    cells, square, degrees = BLOCKS[name]
    found = statistics.residual_sigma(cells)
    assert found.value**2 == pytest.approx(square, abs=0.005)
    assert found.degrees == degrees


def test_residual_of_two_rows_is_that_of_their_pairs_and_what_says_nothing_is_left_out():
    cells = [{0: 1.0, 1: 1.5, 2: 2.5}, {0: 2.1, 1: 2.2, 2: 3.9}]
    found = statistics.residual_sigma(cells)
    assert found == (pytest.approx(np.std([1.1, 0.7, 1.4], ddof=1) / math.sqrt(2)), 2)
    # A seed of one row, a row of one seed, a run that broke.
    more = [cells[0] | {7: 9.0}, cells[1], {1: 5.0}, {0: 1.0, 1: math.nan}]
    assert statistics.residual_sigma(more) == (pytest.approx(found.value), 2)
    assert statistics.residual_sigma([{0: 1.0}, {1: 2.0}]) == (None, 0)
    assert statistics.residual_sigma([{0: math.nan}]) == (None, 0)


def test_two_pairs_are_judged_by_the_residual_of_their_table():
    cells = [{0: 3.0, 1: 3.3}, {0: 3.1, 1: 3.2}]
    found = statistics.compare(*cells, UNKNOWN, statistics.Sigma(0.1, 6))
    assert found.difference == (pytest.approx(0.0, abs=1e-12), pytest.approx(2.44691 * 0.1, rel=1e-5), 2)
    assert (found.judge, found.p) == (Judge.RESIDUAL, pytest.approx(1.0))
    # Three degrees of freedom are too few; a run that broke has no interval by others.
    assert statistics.compare(*cells, UNKNOWN, statistics.Sigma(0.1, 3)).judge is Judge.PAIRS
    broken = statistics.compare({0: 3.0, 1: math.nan}, cells[1], UNKNOWN, statistics.Sigma(0.1, 6))
    assert math.isnan(broken.difference.half)
    assert math.isnan(broken.p)


# Seeds of the rows, of which the first is compared with the second; between which shares p < 0.05 has to lie. Where
# rows have other seeds it is a little seldomer than it says.
TABLES = {
    'six rows of two seeds': ([(0, 1)] * 6, (0.035, 0.065)),
    'rows with other seeds': ([(0, 1), (0, 1, 2, 3), (0, 1, 2, 3), (2, 3, 4)], (0.025, 0.055)),
}


@pytest.mark.parametrize('name', TABLES)
def test_rows_that_are_equal_are_called_different_as_often_as_p_says(name):
    shape, (least, most) = TABLES[name]
    generator = np.random.default_rng(0)
    ps = []
    for _ in range(2000):
        effects = generator.normal(3.0, 0.2, size=5)
        cells = [{seed: effects[seed] + generator.normal(0.0, 0.01) for seed in seeds} for seeds in shape]
        found = statistics.compare(*cells[:2], UNKNOWN, statistics.residual_sigma(cells))
        assert found.judge is Judge.RESIDUAL
        ps.append(found.p)
    assert least <= np.mean(np.array(ps) < 0.05) <= most


def test_pairs_at_the_edge():
    def compare(cell, baseline, sigma=UNKNOWN, residual=UNKNOWN):
        return statistics.compare(cell, baseline, sigma, residual)

    assert compare({0: 1.0}, {1: 1.0}) is None
    assert compare({0: 1.0}, {0: 2.0}).p is None
    assert compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).p == 1.0
    none = statistics.Sigma(0.0, 4)
    assert compare({0: 1.0}, {0: 1.0}, none).p == 1.0
    assert compare({0: 1.0}, {0: 2.0}, none).p == 0.0
    assert compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, residual=none).p == 1.0
    assert compare({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.5}, residual=none).p == 0.0
    assert compare({0: 1.0}, {0: 2.0}, statistics.Sigma(0.1, 3)).p is None


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_digits_follow_the_interval():
    assert str(statistics.Mean(3.63012, 0.00412, 3)) == '3.6301 ± 0.0041 (n=3)'
    assert str(statistics.Mean(3.63012, 0.412, 3)) == '3.630 ± 0.412 (n=3)'
    assert str(statistics.Mean(0.5, None, 1)) == '0.5000 (n=1)'
    assert statistics.Mean(0.5, None, 1).format('+') == '+0.5000'
