"""Our errors against published ones: whether a judgement is due, and what it is.

A verdict says whether the published number could be one more run like ours (Hahn and Meeker, Statistical Intervals,
1991, section 4.7), with the spread of `statistics.moderated` and Holm's p over all rows that are judged together. Both
sides are of the same images, so that their choice is no part of the interval. tests/test_verdict.py simulates how
often a verdict is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.results.published import Published
from harness.results.statistics import (
    PRIOR_FREEDOM,
    Estimate,
    estimate_mean,
    holm,
    mean,
    median_runs,
    moderated,
    smallest,
    std,
    subtract,
    t_quantile,
)

ALPHA = 0.04  # of Holm's p: 5 % of families hold a false verdict then, also where runs scatter by 0.3 points
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
    off = [abs(estimate.value) for estimate in estimates]
    near = all(d <= half <= MAX_HALF_WIDTH and d + half < MARGIN for d, half in zip(off, halves, strict=True))
    word: Literal["consistent", "cannot tell"] = "consistent" if near else "cannot tell"
    return Against(published, estimates[0].value, max(halves), p, p, word)


def _runs(published: Published) -> float:
    """Runs whose mean is as exact as the published number."""
    return median_runs(published.n) if published.statistic == "median" else published.n


def _subtract(published: Published, errors: Sequence[float], planned: int | None) -> Estimate:
    """Ours minus theirs, which is a mean of runs like ours, or has a spread of its own."""
    images, number, rounding = published.images, published.number, published.rounded**2 / 12
    ours = estimate_mean(errors, images, planned)
    assert ours is not None  # as the number of images is known
    if published.std is None or published.n == 1:
        one_run = len(errors) * ours.error**2
        error = math.sqrt(ours.error**2 + one_run / _runs(published) + rounding)
        return Estimate(ours.value - number, error, ours.freedom)
    variance, freedom = moderated(number, published.std, published.n, images)
    return subtract(ours, Estimate(number, math.sqrt(variance / published.n + rounding), freedom))


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
    one_run, _ = moderated(mean(errors), std(errors), len(errors), published.images)

    def enough(n: int) -> bool:
        variance = one_run * (1 / n + 1 / _runs(published)) + published.rounded**2 / 12
        return t_quantile(0.95, PRIOR_FREEDOM + n - 1) * math.sqrt(variance) <= MAX_HALF_WIDTH

    return smallest(enough, MIN_SEEDS)
