"""Statistics of a few runs: spread, intervals, tests.

Errors and times over seeds are assumed to be normal, which three to ten runs cannot confirm; everything here is exact
only under that assumption. scipy is imported when a distribution is needed: planning and `--help` do without.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

MAX_SEEDS = 1_000
LEVEL, ALPHA = 0.90, 0.05
"""Of every interval that is shown and decides, and of each of its ends. `--until-ci` alone has 95 %, and says so."""
PRIOR_FREEDOM, PRIOR_FACTOR = 8, 1.3
NORMAL_QUANTILE = 1.959964  # 97.5 %
MEDIAN_RUNS = {1: 1.0, 2: 2.0, 3: 2.23, 4: 3.36, 5: 3.49, 6: 4.65, 7: 4.75, 8: 5.94, 9: 6.0, 10: 7.25}
"""Runs whose mean is as exact as the median of so many normal runs: the inverse of the median's variance."""


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean or a difference of means, with its standard error."""

    value: float
    error: float
    freedom: float

    def half(self, level: float = LEVEL) -> float:
        return t_quantile(0.5 + level / 2, self.freedom) * self.error

    def interval(self, level: float = LEVEL) -> Interval:
        half = self.half(level)
        return Interval(self.value - half, self.value + half)

    def p(self) -> float:
        """Two-sided, of the hypothesis that the true value is 0."""
        return min(1.0, 2 * Estimate(abs(self.value), self.error, self.freedom).p_above(0.0))

    def p_above(self, threshold: float) -> float:
        """One-sided, of the hypothesis that the true value is at most this."""
        excess = self.value - threshold
        return t_survival(excess / self.error, self.freedom) if self.error else float(excess <= 0)

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.error, self.freedom)


@dataclass(frozen=True, slots=True)
class Shift:
    """How far B lies above A, however their values scatter: a few slow runs do little to it.

    `value` is the difference of the two figures that are shown, of medians say. The interval has the differences of a
    value of B and one of A, by the exact distribution of Mann and Whitney's U (J. L. Hodges and E. L. Lehmann, Ann. Math.
    Stat. 34, 1963), and reaches to `value` where that lies outside, which makes it no narrower. `extra` is half the 90 %
    interval of what the runs cannot show, as normal noise: that of the two sessions.
    """

    value: float
    differences: tuple[float, ...]  # sorted
    a: int
    b: int
    extra: float = 0.0

    def interval(self) -> Interval:
        edge = bisect_right(rank_cdf(self.a, self.b), ALPHA + 1e-9) - 1
        below = max(0.0, self.value - self.differences[edge])
        above = max(0.0, self.differences[-1 - edge] - self.value)
        return Interval(self.value - math.hypot(below, self.extra), self.value + math.hypot(above, self.extra))

    def p_above(self, threshold: float) -> float:
        """One-sided, of the hypothesis that the true shift is at most this; with `extra`, of a normal one."""
        if self.extra:
            error = (self.value - self.interval().low) / t_quantile(0.5 + LEVEL / 2, math.inf)
            return Estimate(self.value, error, math.inf).p_above(threshold)
        return rank_cdf(self.a, self.b)[bisect_right(self.differences, threshold)]

    def __neg__(self) -> Shift:
        return Shift(-self.value, tuple(-d for d in reversed(self.differences)), self.a, self.b, self.extra)


def shift(value: float, a: Sequence[float], b: Sequence[float], extra: float = 0.0) -> Shift | None:
    """None where a side has fewer than three values: no interval of 90 % exists."""
    if min(len(a), len(b)) < 3:
        return None
    return Shift(value, tuple(sorted(y - x for x in a for y in b)), len(a), len(b), extra)


@cache
def rank_cdf(a: int, b: int) -> tuple[float, ...]:
    """P(U <= u) for u from 0 to ab, of Mann and Whitney's U without an effect: the Gaussian binomial coefficients."""
    import numpy as np

    ways = np.zeros(a * b + 1)
    ways[0] = 1
    for i in range(1, a + 1):  # times (1 - q^(b + i)) / (1 - q^i)
        ways[b + i :] -= ways[: -(b + i)].copy()
        for start in range(i):
            ways[start::i] = np.cumsum(ways[start::i])
        ways /= ways.max()
    return tuple((np.cumsum(ways) / ways.sum()).tolist())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN where a value is not finite. Raises ValueError for no values."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan


def std(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1; None for fewer than two values, NaN where one is not finite."""
    if len(values) < 2:
        return None
    centre = mean(values)  # statistics.stdev is exact to the last bit, and 20 times as slow
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two middle ones. Raises ValueError for no values."""
    return statistics.median(values)


def prior_std(error: float, images: int) -> float:
    """The standard deviation, in points, that runs with this error in percent are expected to have.

    1.3 times sqrt(error / 2N), which a calibrated network's error has over N test images (K. Jordan, arXiv:2304.01910;
    proved for two classes). An error below 0.5 % counts as that much.
    """
    return PRIOR_FACTOR * 100 * math.sqrt(max(error, 0.5) / 100 / (2 * images))


def moderated(centre: float, own: float | None, n: int, images: int) -> tuple[float, int]:
    """Variance of one run, and its degrees of freedom: the own spread of n runs, and `prior_std` with the weight of 8.

    G. K. Smyth, Linear models and empirical Bayes methods, Stat. Appl. Genet. Mol. Biol. 3, 2004. One run suffices.
    """
    freedom = PRIOR_FREEDOM + n - 1
    return (PRIOR_FREEDOM * prior_std(centre, images) ** 2 + (n - 1) * (own or 0.0) ** 2) / freedom, freedom


def estimate_mean(errors: Sequence[float], images: int | None, planned: int | None = None) -> Estimate | None:
    """The mean of all errors, in percent, with the moderated spread; without `images` by their own: None for one run.

    `planned`: only the spread of the first so many counts. Where `--until-ci` added the others, their spread decided how
    many they are, while the mean of all, given the residuals, is as exact as ever (C. Stein, A two-sample test, Ann.
    Math. Stat. 16, 1945).
    """
    first = errors[:planned]
    own = std(first)
    if images is not None:
        variance, freedom = moderated(mean(first), own, len(first), images)
    elif own is not None:
        variance, freedom = own**2, len(first) - 1
    else:
        return None
    return Estimate(mean(errors), math.sqrt(variance / len(errors)), freedom)


def subtract(b: Estimate, a: Estimate) -> Estimate:
    """B minus A, by Welch and Satterthwaite: the spreads may differ."""
    error = math.hypot(a.error, b.error)
    if error == 0:
        return Estimate(b.value - a.value, 0.0, a.freedom + b.freedom)
    share = (a.error / error) ** 2  # squares of tiny errors would underflow
    freedom = 1 / (share**2 / a.freedom + (1 - share) ** 2 / b.freedom)
    return Estimate(b.value - a.value, error, freedom)


def holm(ps: Sequence[float]) -> list[float]:
    """p adjusted for the number of tests: S. Holm, Scand. J. Statist. 6, 1979."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = adjusted[index] = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
    return adjusted


def wilson(percent: float, images: int) -> Interval:
    """The interval of 95 % for the error on other images of the same kind, in percent.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, J. Am. Stat. Assoc. 22, 1927.
    """
    share, z = percent / 100, NORMAL_QUANTILE
    scale = 1 + z**2 / images
    centre = (share + z**2 / (2 * images)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return Interval(100 * max(0.0, centre - half), 100 * (centre + half))


def median_runs(n: int) -> float:
    """How many runs have a mean as exact as the median of n."""
    return MEDIAN_RUNS.get(n, 2 * n / math.pi)


def smallest(enough: Callable[[int], bool], least: int = 2) -> int | None:
    """The smallest number of runs for which something holds that goes on holding for more; None above 1,000."""
    n = least + bisect_left(range(least, MAX_SEEDS + 1), True, key=enough)
    return n if n <= MAX_SEEDS else None


def t_survival(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return float(stdtr(freedom, -t))


@lru_cache(4096)
def t_quantile(p: float, freedom: float) -> float:
    """The t that Student's distribution stays below with probability p."""
    from scipy.special import stdtrit

    if not 0 < p < 1:
        raise ValueError(f"probability {p} is not between 0 and 1")
    return float(stdtrit(freedom, p))
