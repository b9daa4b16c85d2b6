"""Our errors against published ones: whether a judgement is due, and what it is.

A verdict says whether the published number could be one more run like ours (Hahn and Meeker, Statistical Intervals,
1991, section 4.7), with the spread of `statistics.moderated` and Holm's p over all rows that are judged together. Both
sides are of the same images, so that their choice is no part of the interval. tests/test_verdict.py simulates how
often a verdict is wrong.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.results.published import Published
from harness.results.statistics import (
    MAX_SEEDS,
    PRIOR_FREEDOM,
    Estimate,
    estimate_mean,
    holm,
    median_runs,
    moderated,
    prior_std,
    subtract,
    t_quantile,
)

ALPHA = (
    0.04  # of Holm's p: 5 % of families then hold a false verdict at most, also where runs scatter by 0.3 points
)
MIN_SEEDS = 3
MAX_HALF_WIDTH = 0.5  # points; where the interval is wider, nothing is called consistent
MARGIN = 1.0  # points, within which the whole interval lies of what is called consistent


@dataclass(frozen=True, slots=True)
class Against:
    """Our error beside a published one: difference = ours - published, in points."""

    published: Published
    difference: float
    half: float | None = None  # of the interval of 90 %; None: no verdict is due
    p: float | None = None  # two-sided, of no difference
    adjusted: float | None = None  # Holm's, over the rows that are judged together
    word: Literal["better", "worse", "consistent", "cannot tell"] | None = None
    reason: str = ""  # why no verdict is due


def compare(
    published: Published, last: Sequence[float], best: Sequence[float] = (), planned: int | None = None
) -> Against:
    """Our errors, in percent: of the last epochs and of each run's best one, one value a run.

    Where the published epoch is not stated both must agree. `planned`: the seeds before `--until-ci` added others.
    """
    ways = {"last": [last], "best": [best], "unstated": [last, best]}[published.rule]
    estimates = [_subtract(published, errors, planned) for errors in ways]
    halves = [estimate.half() for estimate in estimates]
    one_side = len({estimate.value > 0 for estimate in estimates}) == 1
    p = max(estimate.p() for estimate in estimates) if one_side else 1.0
    near = all(
        abs(estimate.value) <= half and abs(estimate.value) + half < MARGIN
        for estimate, half in zip(estimates, halves, strict=True)
    )
    word: Literal["consistent", "cannot tell"] = "cannot tell"
    if near and max(halves) <= MAX_HALF_WIDTH:
        word = "consistent"
    return Against(published, estimates[0].value, max(halves), p, p, word)


def _runs(published: Published) -> float:
    """Runs whose mean is as exact as the published number."""
    return median_runs(published.n) if published.statistic == "median" else published.n


def _subtract(published: Published, errors: Sequence[float], planned: int | None) -> Estimate:
    """Ours minus theirs, which is a mean of runs like ours, or has a spread of its own."""
    images, number, rounding = published.images, published.number, published.rounded**2 / 12
    spread, ours = moderated(errors, images, planned), estimate_mean(errors, images, planned)
    assert spread is not None  # as the number of images is known
    assert ours is not None
    if published.std is None or published.n == 1:
        error = math.sqrt(spread.variance * (1 / len(errors) + 1 / _runs(published)) + rounding)
        return Estimate(ours.value - number, error, spread.freedom)
    freedom = PRIOR_FREEDOM + published.n - 1
    squares = PRIOR_FREEDOM * prior_std(number, images) ** 2 + (published.n - 1) * published.std**2
    theirs = Estimate(number, math.sqrt(squares / freedom / published.n + rounding), freedom)
    return subtract(ours, theirs)


def adjust(judged: Sequence[Against | None]) -> list[Against | None]:
    """The verdicts of rows that stand together: better or worse where Holm's p is below ALPHA."""
    told = list(judged)
    tested = [(i, each, each.p) for i, each in enumerate(judged) if each is not None and each.p is not None]
    for (i, each, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        told[i] = replace(each, adjusted=p)
        if p < ALPHA:
            told[i] = replace(each, adjusted=p, word="better" if each.difference < 0 else "worse")
    return told


def seeds_to_tell(published: Published, errors: Sequence[float]) -> int | None:
    """The smallest number of runs like these whose interval is ±0.5 points; None where no number suffices."""
    spread = moderated(errors, published.images)
    assert spread is not None

    def enough(n: int) -> bool:
        variance = spread.variance * (1 / n + 1 / _runs(published)) + published.rounded**2 / 12
        freedom = PRIOR_FREEDOM + n - 1
        return t_quantile(0.95, freedom) * math.sqrt(variance) <= MAX_HALF_WIDTH

    n = bisect_left(range(MIN_SEEDS, MAX_SEEDS), True, key=enough) + MIN_SEEDS
    return n if n < MAX_SEEDS else None
