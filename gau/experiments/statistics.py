"""What can be said of a mean of few seeds: intervals, the spread between seeds, tests of differences."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Fewer degrees of freedom say too little of a standard deviation to judge single runs by it.
MIN_DEGREES = 4


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
      value: of n numbers.
      half: half the width of its 95 % t interval; None for one number, of which nothing is known.
      n: how many numbers.
    """

    value: float
    half: float | None
    n: int

    def __str__(self) -> str:
        """Returns e.g. `3.6301 ± 0.0041 (n=3)`, with as many digits as the interval is worth, three at least."""
        return self.format('')

    def format(self, sign: str, seeds: str = '') -> str:
        """Returns the same; with `sign` '+' positive values carry it, and `seeds` may say more than n."""
        seeds = seeds or str(self.n)
        if self.half is None:
            return f'{self.value:{sign}.4f} (n={seeds})'
        digits = 4
        if self.half and math.isfinite(self.half):
            digits = min(max(1 - math.floor(math.log10(self.half)), 3), 6)
        return f'{self.value:{sign}.{digits}f} ± {self.half:.{digits}f} (n={seeds})'


class Sigma(NamedTuple):
    """The standard deviation between seeds, pooled over the cells of a table.

    Attributes:
      value: None where no cell has two seeds.
      degrees: of freedom.
    """

    value: float | None
    degrees: int


class Comparison(NamedTuple):
    """A difference between two cells.

    Attributes:
      difference: over the seeds that both have; of a cell's mean where it is not paired.
      p: of a two-sided t test; None where too little is known.
      paired: whether by seed.
      baseline_seeds: n of the baseline where it is not paired.
    """

    difference: Mean
    p: float | None
    paired: bool = True
    baseline_seeds: int = 0

    def __str__(self) -> str:
        """Returns e.g. `+0.2041 ± 0.0520 (n=3)`, by seed, and `(n=1, 3)` of two means."""
        return self.difference.format('+', '' if self.paired else f'{self.difference.n}, {self.baseline_seeds}')


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean with its interval."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return Mean(float(values.mean()), None, n)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Mean(float(values.mean()), float(half), n)


def pooled_sigma(cells: Sequence[Sequence[float]]) -> Sigma:
    """Returns the standard deviation between seeds, taken to be the same in every cell with finite numbers."""
    several = [np.asarray(cell, float) for cell in cells if len(cell) > 1 and np.isfinite(cell).all()]
    degrees = sum(len(cell) - 1 for cell in several)
    if not degrees:
        return Sigma(None, 0)
    squares = sum(float(np.square(cell - cell.mean()).sum()) for cell in several)
    return Sigma(math.sqrt(squares / degrees), degrees)


def compare(cell: Mapping[int, float], baseline: Mapping[int, float], sigma: Sigma) -> Comparison | None:
    """Returns how far a cell is from a baseline: by seed if they share two; else by their means, as `sigma` judges it.

    Runs of one seed see the same batches in the same order, so what the batches do to both cancels. Where fewer are
    shared, the means of all seeds are compared, with the standard deviation of all cells for that of these two, as long
    as it has `MIN_DEGREES`. Without it a shared seed gives a difference and no more, and no shared seed None.

    Args:
      cell: metric by seed.
      baseline: the same.
      sigma: of the table that both are rows of.
    """
    seeds = sorted(cell.keys() & baseline.keys())
    own, other = [cell[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    if len(seeds) < 2 and sigma.degrees >= MIN_DEGREES:
        return _of_means(list(cell.values()), list(baseline.values()), sigma)
    if not seeds:
        return None
    difference = mean(np.subtract(own, other))
    if len(seeds) < 2:
        return Comparison(difference, None)
    if difference.half == 0:
        # The t test divides by it.
        return Comparison(difference, 1.0 if difference.value == 0 else 0.0)
    return Comparison(difference, float(stats.ttest_rel(own, other).pvalue))


def _of_means(cell: Sequence[float], baseline: Sequence[float], sigma: Sigma) -> Comparison:
    value = float(np.mean(cell) - np.mean(baseline))
    error = sigma.value * math.sqrt(1 / len(cell) + 1 / len(baseline))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, sigma.degrees) * error)
    p = float(2 * stats.t.sf(abs(value) / error, sigma.degrees)) if error else float(value == 0)
    return Comparison(Mean(value, half, len(cell)), p, False, len(baseline))


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p values corrected for being several, by Holm's method; one that is not a number stays so."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest if math.isfinite(ps[index]) else ps[index]
    return corrected
