"""What can be said of a mean of few seeds: intervals, the spread between seeds, tests of differences."""

import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# Fewer degrees of freedom say too little of a standard deviation to judge one or two runs by it.
MIN_DEGREES = 4
# Fewer say too little of their own spread: of two an interval is 12.7 standard errors wide to each side.
MIN_PAIRS = 3


class Judge(enum.Enum):
    """What says how far chance goes with a difference."""

    PAIRS = enum.auto()  # The spread of its own pairs.
    RESIDUAL = enum.auto()  # What rows and seeds leave unexplained in the whole table.
    MEANS = enum.auto()  # The spread between seeds in the whole table; the difference is one of means.


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
      value: of n numbers.
      half: half the width of its 95 % t interval; None where nothing is known of it.
      n: how many numbers.
    """

    value: float
    half: float | None
    n: int

    def __str__(self) -> str:
        """Returns e.g. `3.6301 ± 0.0041 (n=3)`, with as many digits as the interval is worth, three at least."""
        return f'{self.format()} (n={self.n})'

    def format(self, sign: str = '') -> str:
        """Returns the same without n; with `sign` '+' positive values carry it."""
        if self.half is None:
            return f'{self.value:{sign}.4f}'
        digits = 4
        if self.half and math.isfinite(self.half):
            digits = min(max(1 - math.floor(math.log10(self.half)), 3), 6)
        return f'{self.value:{sign}.{digits}f} ± {self.half:.{digits}f}'


class Sigma(NamedTuple):
    """A standard deviation, pooled over the cells of a table.

    Attributes:
      value: None without a degree of freedom.
      degrees: of freedom.
    """

    value: float | None
    degrees: int


class Comparison(NamedTuple):
    """A difference between two cells.

    Attributes:
      difference: over the seeds that both have; of the cells' means where it is judged as one of means.
      p: of a two-sided t test; None where too little is known.
      judge: what the interval and p are made of.
      shared: how many seeds both have.
      smaller: n of the cell with fewer seeds; as many as are shared, unless either has seeds of its own.
    """

    difference: Mean
    p: float | None
    judge: Judge
    shared: int
    smaller: int


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean with its interval."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return Mean(float(values.mean()), None, n)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return Mean(float(values.mean()), float(half), n)


def mean_of_cell(values: Sequence[float], sigma: Sigma) -> Mean:
    """Returns a mean; of fewer than `MIN_PAIRS` numbers its interval is by `sigma`, if that has `MIN_DEGREES`."""
    own = mean(values)
    if own.n >= MIN_PAIRS or sigma.degrees < MIN_DEGREES or not math.isfinite(own.value):
        return own
    return _judged(own, sigma, 1 / own.n)[0]


def pooled_sigma(cells: Sequence[Sequence[float]]) -> Sigma:
    """Returns the standard deviation between seeds, taken to be the same in every cell with finite numbers."""
    several = [np.asarray(cell, float) for cell in cells if len(cell) > 1 and np.isfinite(cell).all()]
    degrees = sum(len(cell) - 1 for cell in several)
    if not degrees:
        return Sigma(None, 0)
    squares = sum(float(np.square(cell - cell.mean()).sum()) for cell in several)
    return Sigma(math.sqrt(squares / degrees), degrees)


def residual_sigma(cells: Sequence[Mapping[int, float]]) -> Sigma:
    """Returns the standard deviation that the effects of rows and seeds leave over: that of randomized blocks.

    All runs of a seed see the same batches, so seeds are blocks by construction. A least-squares fit of row + seed to
    every cell with finite numbers, of variance one for all; a seed that one row alone has says nothing. Where all rows
    have all seeds, these are the (rows - 1) (seeds - 1) degrees of freedom of the textbook.

    Args:
      cells: metric by seed, of each row.
    """
    cells = [cell for cell in cells if np.isfinite(list(cell.values())).all()]
    seeds = sorted({seed for cell in cells for seed in cell})
    values = np.array([value for cell in cells for value in cell.values()])
    rows = np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])
    blocks = len(cells) + np.array([seeds.index(seed) for cell in cells for seed in cell], int)
    design = np.zeros((len(values), len(cells) + len(seeds)))
    design[np.arange(len(values)), rows] = design[np.arange(len(values)), blocks] = 1
    effects, _, rank, _ = np.linalg.lstsq(design, values)
    degrees = len(values) - int(rank)
    if not degrees:
        return Sigma(None, 0)
    return Sigma(math.sqrt(float(np.square(values - design @ effects).sum()) / degrees), degrees)


def compare(
    cell: Mapping[int, float], baseline: Mapping[int, float], sigma: Sigma, residual: Sigma
) -> Comparison | None:
    """Returns how far a cell is from a baseline: by seed if they share two; else by their means, as `sigma` judges it.

    Runs of one seed see the same batches in the same order, so what the batches do to both cancels. `MIN_PAIRS` pairs
    are judged by their own spread, fewer by `residual`, whose variance one pair's difference has twice. Where rows have
    different seeds, p then comes out a little too large: the mean of two pairs is not the best estimate of the fit.

    Where fewer than two seeds are shared, the means of all seeds are compared, with the standard deviation of all cells
    for that of these two. Both standard deviations count as long as they have `MIN_DEGREES`. Without `residual` two
    pairs are judged by their own spread, without `sigma` a shared seed gives a difference and no more, and no shared
    seed None.

    Args:
      cell: metric by seed.
      baseline: the same.
      sigma: between seeds, of the table that both are rows of.
      residual: of the same table.
    """
    seeds = sorted(cell.keys() & baseline.keys())
    own, other = [cell[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    counts = len(seeds), min(len(cell), len(baseline))
    if len(seeds) < 2 and sigma.degrees >= MIN_DEGREES:
        difference = Mean(float(np.mean([*cell.values()]) - np.mean([*baseline.values()])), None, len(cell))
        judged, p = _judged(difference, sigma, 1 / len(cell) + 1 / len(baseline))
        return Comparison(judged, p, Judge.MEANS, *counts)
    if not seeds:
        return None
    difference = mean(np.subtract(own, other))
    if len(seeds) < 2:
        return Comparison(difference, None, Judge.PAIRS, *counts)
    if len(seeds) < MIN_PAIRS and residual.degrees >= MIN_DEGREES and math.isfinite(difference.value):
        judged, p = _judged(difference, residual, 2 / len(seeds))
        return Comparison(judged, p, Judge.RESIDUAL, *counts)
    # The t test divides by the spread.
    p = float(stats.ttest_rel(own, other).pvalue) if difference.half else float(difference.value == 0)
    return Comparison(difference, p, Judge.PAIRS, *counts)


def _judged(difference: Mean, sigma: Sigma, variances: float) -> tuple[Mean, float]:
    """Returns a difference with its interval, and p of the two-sided t test; its variance is so many of `sigma`'s."""
    error = sigma.value * math.sqrt(variances)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, sigma.degrees) * error)
    p = float(2 * stats.t.sf(abs(difference.value) / error, sigma.degrees)) if error else float(difference.value == 0)
    return difference._replace(half=half), p


def holm(ps: Sequence[float]) -> list[float]:
    """Returns p values corrected for being several, by Holm's method; one that is not a number stays so."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(np.argsort(ps)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest if math.isfinite(ps[index]) else ps[index]
    return corrected
