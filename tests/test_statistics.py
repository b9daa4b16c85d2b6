"""The statistics against scipy, published worked examples, and properties that hold for every sample."""

import math
import statistics as stdlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.results.statistics import (
    MEDIAN_RUNS,
    Estimate,
    estimate_mean,
    holm,
    mean,
    moderated,
    prior_std,
    std,
    t_quantile,
    wilson,
)

errors = st.integers(50, 6_000).map(lambda hundredths: hundredths / 100)  # percent, as 10,000 images give it
some = st.lists(errors, min_size=2, max_size=8)


@given(some)
def test_mean_and_std_are_the_usual_ones(values: list[float]) -> None:
    assert mean(values) == pytest.approx(stdlib.fmean(values))
    assert std(values) == pytest.approx(stdlib.stdev(values), rel=1e-9, abs=1e-12)


def test_values_without_a_spread_or_a_mean() -> None:
    assert std([7.0]) is None
    assert estimate_mean([7.0], None) is None
    assert math.isnan(mean([1.0, math.nan]))
    assert math.isnan(mean([math.inf, -math.inf]))
    spread = std([1.0, math.inf])
    assert spread is not None
    assert math.isnan(spread)
    with pytest.raises(ValueError, match="at least one"):
        mean([])


@settings(max_examples=200)
@given(st.floats(-80, 80).filter(lambda t: abs(t) > 1e-3), st.floats(1, 1e4))  # nearer to 0 scipy's is cruder
def test_students_t_is_scipys(t: float, freedom: float) -> None:
    assert Estimate(t, 1.0, freedom).p_above(0.0) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9, abs=1e-300)


@given(st.floats(-80, 80))
def test_students_t_of_one_degree_is_cauchys(t: float) -> None:
    assert Estimate(t, 1.0, 1).p_above(0.0) == pytest.approx(
        0.5 - math.atan(t) / math.pi, rel=1e-8
    )  # scipy's own error near 0


@settings(max_examples=100)
@given(st.floats(0.001, 0.999), st.floats(1, 1e3))
def test_the_quantile_is_scipys(p: float, freedom: float) -> None:
    assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-8, abs=1e-10)


def test_the_quantile_is_the_printed_tables() -> None:
    # any textbook's table of Student's t, 95 % two-sided
    for freedom, t in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert t_quantile(0.975, freedom) == pytest.approx(t, abs=6e-4)
    with pytest.raises(ValueError, match="probability"):
        t_quantile(1.0, 3)


@given(some)
def test_the_confidence_interval_is_scipys(values: list[float]) -> None:
    estimate = estimate_mean(values, None)
    assert estimate is not None
    interval, spread = estimate.interval(0.95), std(values)
    if spread and spread > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, mean(values), spread / math.sqrt(len(values)))
        assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9)
    assert interval.low <= mean(values) <= interval.high


# --- the moderated spread ---


def test_the_prior_is_the_noise_of_the_test_set() -> None:
    assert prior_std(8.0, 10_000) == pytest.approx(1.3 * 0.2)
    assert prior_std(0.0, 10_000) == prior_std(0.5, 10_000)
    assert prior_std(8.0, 2_500) == pytest.approx(2 * prior_std(8.0, 10_000))


def test_the_spread_of_few_runs_is_moderated() -> None:
    prior = prior_std(8.0, 10_000) ** 2
    assert moderated(8.0, None, 1, 10_000) == pytest.approx((prior, 8))
    assert moderated(8.0, 0.1, 3, 10_000) == pytest.approx(((8 * prior + 2 * 0.01) / 10, 10))
    assert estimate_mean([8.0], None) is None
    plain, three = (estimate_mean([7.9, 8.0, 8.1], images) for images in (None, 10_000))
    assert plain is not None
    assert three is not None
    assert (plain.value, plain.error**2, plain.freedom) == pytest.approx((8.0, 0.01 / 3, 2))
    assert (three.error**2, three.freedom) == pytest.approx(((8 * prior + 2 * 0.01) / 30, 10))


def test_seeds_that_were_added_for_their_spread_count_in_the_mean_alone() -> None:
    planned, added = [7.9, 8.0, 8.1, 8.0, 8.0], [9.0, 7.0]
    first = estimate_mean(planned, 10_000)
    all_of_them = estimate_mean(planned + added, 10_000, planned=5)
    assert first is not None
    assert all_of_them is not None
    assert all_of_them.value == pytest.approx(8.0)
    assert all_of_them.freedom == first.freedom
    assert all_of_them.error == pytest.approx(first.error * math.sqrt(5 / 7))


@given(some, some)
def test_a_difference_without_a_prior_is_welchs(a: list[float], b: list[float]) -> None:
    if min(std(a) or 0, std(b) or 0) < 1e-6:  # scipy warns
        return
    first, second = estimate_mean(a, None), estimate_mean(b, None)
    assert first is not None
    assert second is not None
    ours, theirs = second - first, stats.ttest_ind(b, a, equal_var=False)
    interval = theirs.confidence_interval(0.90)
    assert ours.p() == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (ours.interval().low, ours.interval().high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    greater = stats.ttest_ind([v - 0.3 for v in b], a, equal_var=False, alternative="greater").pvalue
    assert ours.p_above(0.3) == pytest.approx(greater, rel=1e-6, abs=1e-12)


def test_holm_of_a_worked_example() -> None:
    # the result of p.adjust in R
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_a_median_is_as_exact_as_a_mean_of_fewer() -> None:
    draw = np.random.default_rng(0)
    for n, runs in MEDIAN_RUNS.items():
        variance = np.median(draw.standard_normal((60_000, n)), axis=1).var()
        assert runs == pytest.approx(1 / variance, rel=0.03)


def test_wilsons_interval() -> None:
    # scipy's own, and the ends that have no width by the usual formula
    for wrong, images in ((800, 10_000), (16, 360), (0, 360), (360, 360)):
        interval = wilson(100 * wrong / images, images)
        theirs = stats.binomtest(wrong, images).proportion_ci(0.95, "wilson")
        assert (interval.low, interval.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-4)


@pytest.mark.parametrize(
    ("images", "error", "rows", "seeds", "together", "least"),
    [
        (360, 0.05, 1, 1, 0.0, 0.93), (360, 0.1, 17, 1, 0.0, 0.92), (360, 0.1, 17, 1, 0.5, 0.92), (360, 0.5, 17, 1, 0.9, 0.94),
        (360, 0.1, 5, 3, 0.5, 0.97), (360, 0.1, 1, 10, 0.9, 0.95), (2_000, 0.05, 5, 1, 0.5, 0.93), (2_000, 0.5, 2, 1, 0.0, 0.93),
        (10_000, 0.05, 5, 1, 0.9, 0.93),
    ],
)  # fmt: skip
def test_wilsons_interval_holds_the_errors_of_all_rows(
    images: int, error: float, rows: int, seeds: int, together: float, least: float
) -> None:
    """On all images of their kind, at once: at the smallest and the largest error of several rows it must, as these are the
    smallest and the largest by chance. Rows and seeds fail on the same images as far as they go `together`."""
    draw, repeats, held = np.random.default_rng(0), 1_000 if images < 10_000 else 200, 0
    for _ in range(repeats):
        hard, own = draw.standard_normal(images), draw.standard_normal((rows, seeds, images))
        wrong = math.sqrt(together) * hard + math.sqrt(1 - together) * own < stats.norm.ppf(error)
        shares = 100 * wrong.mean(axis=(1, 2))
        ends = [wilson(share, images, rows) for share in (shares.min(), shares.max())]
        held += all(low <= 100 * error <= high for low, high in ends)
    assert held >= least * repeats


def test_wilsons_interval_is_not_of_other_seeds_or_of_other_images_alone() -> None:
    """What its caption must not promise: the mean of three seeds that scatter by a point, and the error on 10,000 other images."""
    draw, seeds, images = np.random.default_rng(0), 0, 0
    for _ in range(1_000):
        errors = draw.normal(0.08, 0.01, 3)
        low, high = wilson(100 * (draw.binomial(10_000, errors) / 10_000).mean(), 10_000)
        seeds += low <= 8 <= high
        low, high = wilson(100 * draw.binomial(10_000, 0.08) / 10_000, 10_000)
        images += low <= 100 * draw.binomial(10_000, 0.08) / 10_000 <= high
    assert 600 <= seeds <= 720
    assert 800 <= images <= 860
