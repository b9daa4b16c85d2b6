"""Statistics of a few runs: spread, intervals, tests, verdicts on published numbers.

Errors and times over seeds are assumed to be normal, which three to ten runs cannot confirm; everything here is exact
only under that assumption. A verdict says whether the published number could be one more run like ours (Hahn and Meeker,
Statistical Intervals, 1991, section 4.7), by Holm's p over all rows that are judged together; both sides are of the same
images, so that their choice is no part of it. tests/test_verdict.py simulates how often a verdict is wrong. scipy is imported when a distribution is needed: planning and `--help` do without.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from typing import Literal, NamedTuple

from harness.results.published import Published

MAX_SEEDS = 1_000
LEVEL, ALPHA = 0.90, 0.05
"""Of every interval that is shown and decides, and of each of its ends. `--until-ci` alone has 95 %, and says so."""
GOAL_LEVEL, OWN_GOAL_LEVEL = 0.965, 0.98  # of `--until-ci`: as one stops by them, they hold the true mean in 95 %
PRIOR_FREEDOM, PRIOR_FACTOR = 8, 1.3
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
        if not self.error:
            return float(excess <= 0)
        from scipy.special import stdtr

        return float(stdtr(self.freedom, -excess / self.error))

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.error, self.freedom)

    def __sub__(self, other: Estimate) -> Estimate:
        """By Welch and Satterthwaite: the spreads may differ."""
        error, freedom = math.hypot(self.error, other.error), self.freedom + other.freedom
        if error:
            share = (other.error / error) ** 2  # squares of tiny errors would underflow
            freedom = 1 / (share**2 / other.freedom + (1 - share) ** 2 / self.freedom)
        return Estimate(self.value - other.value, error, freedom)


@dataclass(frozen=True)
class Shift:
    """How far B lies above A, however their values scatter: a few slow runs do little to it.

    `value` is the difference of the two figures that are shown, of medians say. The interval has the differences of a
    value of B and one of A, by the exact distribution of Mann and Whitney's U (J. L. Hodges and E. L. Lehmann, Ann. Math.
    Stat. 34, 1963), and reaches to `value` where that lies outside, which makes it no narrower. `extra` is half the 90 %
    interval of what the runs cannot show, as normal noise: that of the two sessions.
    """

    value: float
    a: tuple[float, ...]
    b: tuple[float, ...]
    extra: float = 0.0

    @cached_property
    def differences(self) -> list[float]:
        return sorted(b - a for a in self.a for b in self.b)

    def interval(self) -> Interval:
        """Of 90 %; needs three values a side."""
        edge = bisect_right(rank_cdf(len(self.a), len(self.b)), ALPHA + 1e-9) - 1
        below = max(0.0, self.value - self.differences[edge])
        above = max(0.0, self.differences[-1 - edge] - self.value)
        return Interval(self.value - math.hypot(below, self.extra), self.value + math.hypot(above, self.extra))

    def p_above(self, threshold: float) -> float:
        """One-sided, of the hypothesis that the true shift is at most this; with `extra`, of a normal one."""
        if self.extra:
            error = (self.value - self.interval().low) / t_quantile(0.5 + LEVEL / 2, math.inf)
            return Estimate(self.value, error, math.inf).p_above(threshold)
        return rank_cdf(len(self.a), len(self.b))[bisect_right(self.differences, threshold)]

    def __neg__(self) -> Shift:
        return Shift(-self.value, self.b, self.a, self.extra)


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


def prior_std(error: float, images: int) -> float:
    """The standard deviation, in points, that runs with this error in percent are expected to have.

    1.3 times sqrt(error / 2N), which a calibrated network's error has over N test images (K. Jordan, arXiv:2304.01910;
    proved for two classes). An error below 0.5 % counts as that much.
    """
    return PRIOR_FACTOR * 100 * math.sqrt(max(error, 0.5) / 100 / (2 * images))


def squared_spread(errors: Sequence[float], images: int) -> float | None:
    """How many times `prior_std` these runs spread, squared; None for fewer than three, or where one diverged."""
    if len(errors) < 3 or not all(map(math.isfinite, errors)):
        return None
    median = (1 - 2 / (9 * (len(errors) - 1))) ** 3  # of chi² over its degrees of freedom
    return ((std(errors) or 0.0) / prior_std(mean(errors), images)) ** 2 / median


def scatter(spreads: Iterable[float | None]) -> float:
    """How many times `prior_std` runs spread, at least once: by the median row of those whose `squared_spread` is known."""
    known = [one for one in spreads if one is not None]
    return math.sqrt(max(1.0, statistics.median(known))) if known else 1.0


def moderated(centre: float, own: float | None, n: int, images: int, others: float = 1.0) -> tuple[float, int]:
    """Variance of one run, and its degrees of freedom: the own spread of n runs, and `prior_std`, times the `scatter` of other
    rows, with the weight of 8.

    G. K. Smyth, Linear models and empirical Bayes methods, Stat. Appl. Genet. Mol. Biol. 3, 2004. Where the own spread is
    the larger one it counts alone: networks that have not converged scatter by much more than the test images explain.
    """
    prior, freedom = others * prior_std(centre, images), PRIOR_FREEDOM + n - 1
    if own is not None and own > prior:
        return own**2, n - 1
    return (PRIOR_FREEDOM * prior**2 + (n - 1) * (own or 0.0) ** 2) / freedom, freedom


def estimate_mean(
    errors: Sequence[float], images: int | None, planned: int | None = None, others: float = 1.0
) -> Estimate | None:
    """The mean of all errors, in percent, with the moderated spread; without `images` by their own: None for one run.

    `planned`: only the spread of the first so many counts. Where `--until-ci` added the others, their spread decided how
    many they are, while the mean of all, given the residuals, is as exact as ever (C. Stein, A two-sample test, Ann.
    Math. Stat. 16, 1945).
    """
    first = errors[:planned]
    own = std(first)
    if images is not None:
        variance, freedom = moderated(mean(first), own, len(first), images, others)
    elif own is not None:
        variance, freedom = own**2, len(first) - 1
    else:
        return None
    return Estimate(mean(errors), math.sqrt(variance / len(errors)), freedom)


def goal_half(errors: Sequence[float], images: int | None) -> float:
    """Half the interval of the mean by which `--until-ci` stops, in points: of a higher level where the own spread counts alone,
    as one stops when that is small by chance."""
    estimate = estimate_mean(errors, images) if errors else None
    if estimate is None:
        return math.inf
    return estimate.half(OWN_GOAL_LEVEL if estimate.freedom < len(errors) else GOAL_LEVEL)


def holm(ps: Sequence[float]) -> list[float]:
    """p adjusted for the number of tests: S. Holm, Scand. J. Statist. 6, 1979."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = adjusted[index] = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
    return adjusted


def wilson(percent: float, images: int, of: int = 1) -> Interval:
    """The interval of 95 % for the error of the same networks on all images of the kind, in percent: for so many rows at once.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, J. Am. Stat. Assoc. 22, 1927.
    """
    share, z = percent / 100, -statistics.NormalDist().inv_cdf(0.025 / of)
    scale = 1 + z**2 / images
    centre = (share + z**2 / (2 * images)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return Interval(100 * max(0.0, centre - half), 100 * (centre + half))


def smallest(enough: Callable[[int], bool], least: int = 2) -> int | None:
    """The smallest number of runs for which something holds that goes on holding for more; None above 1,000."""
    n = least + bisect_left(range(least, MAX_SEEDS + 1), True, key=enough)
    return n if n <= MAX_SEEDS else None


@lru_cache(4096)
def t_quantile(p: float, freedom: float) -> float:
    """The t that Student's distribution stays below with probability p."""
    from scipy.special import stdtrit

    if not 0 < p < 1:
        raise ValueError(f"probability {p} is not between 0 and 1")
    return float(stdtrit(freedom, p))


# --- verdicts: could a published number be one more run like ours? ---

VERDICT_ALPHA = 0.04
"""Of Holm's p: 5 % of families hold a false verdict then, also where runs scatter by 0.3 points."""
MIN_SEEDS = 3
MAX_HALF_WIDTH = 0.5  # points; where the interval is wider, nothing is called consistent
MARGIN = 1.0  # points, within which the whole interval lies of what is called consistent


@dataclass(slots=True)
class Against:
    """Our error beside a published one: difference = ours - published, in points."""

    published: Published
    difference: float
    half: float | None = None  # of the interval of 90 %; None: no verdict is due
    p: float | None = None  # two-sided, of no difference
    word: Literal["better", "worse", "consistent", "cannot tell"] | None = None
    adjusted: float | None = None  # Holm's p, over the rows that are judged together
    reason: str = ""  # why no verdict is due
    errors: Sequence[float] = ()  # ours whose spread was judged, in percent
    others: float = 1.0  # the scatter of the rows beside it
    again: Callable[[float], Against] | None = None  # judges by another one

    @property
    def seeds_to_tell(self) -> int | None:
        """None too where no verdict is due."""
        return None if self.half is None else seeds_to_tell(self.published, self.errors, self.others)


def judge(
    published: Published,
    last: Sequence[float],
    best: Sequence[float] = (),
    planned: int | None = None,
    others: float = 1.0,
) -> Against:
    """The verdict on our errors, in percent: of the last epochs and of each run's best one, one value a run.

    Where the published epoch is not stated both must agree. `planned`: the seeds before `--until-ci` added others.
    """
    ways = {"last": [last], "best": [best], "unstated": [last, best]}[published.rule]
    means = [ours for way in ways if (ours := estimate_mean(way, published.images, planned, others))]
    told = [(one.value, one.half(), one.p()) for one in (_subtract(published, ours, len(last)) for ours in means)]
    near = all(abs(d) <= half <= MAX_HALF_WIDTH and abs(d) + half < MARGIN for d, half, _ in told)
    differences, halves, ps = zip(*told, strict=True)
    p = max(ps) if min(differences) > 0 or max(differences) <= 0 else 1.0
    word: Literal["consistent", "cannot tell"] = "consistent" if near else "cannot tell"
    again = partial(judge, published, last, best, planned)
    first = ways[0][:planned]
    return Against(published, differences[0], max(halves), p, word, errors=first, others=others, again=again)


def _subtract(published: Published, ours: Estimate, n: int) -> Estimate:
    """The mean of our n runs minus theirs, which is a mean of runs like ours, or has a spread of its own."""
    number, rounding, runs = published.number, published.rounded**2 / 12, float(published.n)
    if published.std is not None and runs > 1:
        variance, freedom = moderated(number, published.std, published.n, published.images)
        return ours - Estimate(number, math.sqrt(variance / runs + rounding), freedom)
    if published.statistic == "median":
        runs = MEDIAN_RUNS.get(published.n, 2 * runs / math.pi)
    return Estimate(ours.value - number, math.sqrt(ours.error**2 * (1 + n / runs) + rounding), ours.freedom)


def adjust(judged: Sequence[Against]) -> None:
    """The verdicts of rows that stand together: each by the scatter of the others, better or worse where Holm's p is below
    VERDICT_ALPHA."""
    tested = [each for each in judged if each.p is not None]
    spreads = [squared_spread(each.errors, each.published.images) for each in tested]
    for i, each in enumerate(tested):
        if each.again and (others := scatter(spreads[:i] + spreads[i + 1 :])) > 1:
            wider = each.again(others)
            each.half, each.p, each.word, each.others = wider.half, wider.p, wider.word, others
    for each, p in zip(tested, holm([each.p or 0.0 for each in tested]), strict=True):
        each.adjusted = p
        if p < VERDICT_ALPHA:
            each.word = "better" if each.difference < 0 else "worse"


def seeds_to_tell(published: Published, errors: Sequence[float], others: float = 1.0) -> int | None:
    """The smallest number of runs whose interval is ±0.5 points if they scatter as these do; None where no number suffices."""
    centre = mean(errors)
    variance, freedom = moderated(centre, std(errors), len(errors), published.images, others)

    def enough(n: int) -> bool:
        ours = Estimate(centre, math.sqrt(variance / n), freedom - len(errors) + n)
        return _subtract(published, ours, n).half() <= MAX_HALF_WIDTH

    return smallest(enough, MIN_SEEDS)
