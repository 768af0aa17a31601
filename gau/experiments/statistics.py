"""What can be said of a mean of few seeds: intervals, the spread between seeds, paired tests."""

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

    def format(self, sign: str) -> str:
        """Returns the same; with `sign` '+' positive values carry it."""
        if self.half is None:
            return f'{self.value:{sign}.4f} (n={self.n})'
        digits = (
            4
            if self.half == 0 or not math.isfinite(self.half)
            else min(max(1 - math.floor(math.log10(self.half)), 3), 6)
        )
        return f'{self.value:{sign}.{digits}f} ± {self.half:.{digits}f} (n={self.n})'


class Sigma(NamedTuple):
    """The standard deviation between seeds, pooled over the cells of a table.

    Attributes:
      value: None where no cell has two seeds.
      degrees: of freedom.
    """

    value: float | None
    degrees: int

    def between_two(self) -> float | None:
        """Returns how far two single runs are apart by chance, in 95 % of cases; None where too little is known."""
        if self.degrees < MIN_DEGREES:
            return None
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees) * self.value * math.sqrt(2))


class Paired(NamedTuple):
    """A difference between two cells, over the seeds that both have.

    Attributes:
      difference: its mean.
      p: of a two-sided paired t test; None with fewer than two shared seeds.
    """

    difference: Mean
    p: float | None


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


def paired(cell: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Returns how far a cell is from a baseline, by seed; None if they share no seed.

    Runs of one seed see the same batches in the same order, so what the batches do to both cancels.
    """
    seeds = sorted(cell.keys() & baseline.keys())
    if not seeds:
        return None
    own, other = [cell[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    difference = mean(np.subtract(own, other))
    if len(seeds) < 2:
        return Paired(difference, None)
    if difference.half == 0:
        # The t test divides by it.
        return Paired(difference, 1.0 if difference.value == 0 else 0.0)
    return Paired(difference, float(stats.ttest_rel(own, other).pvalue))


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p values corrected for being several, by Holm's method; one that is not a number stays so."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest if math.isfinite(ps[index]) else ps[index]
    return corrected
