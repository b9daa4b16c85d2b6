"""Verdicts against published numbers: how often they are wrong, by simulation, and where none is due."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import make_record
from scipy import stats
from test_table import make_run, text

from harness.results.explain import why
from harness.results.published import Published, find_published
from harness.results.report.columns import find
from harness.results.rows import summarise
from harness.results.statistics import MAX_HALF_WIDTH, adjust, judge, mean, moderated, seeds_to_tell, std
from harness.results.store import Stored

PUBLISHED = Published(
    dataset="cifar10", variant="msra", depth=20, error=8.0, rule="last", recipe="same", source="a paper"
)
ROWS = 17


def simulate(families: int, n: int, std: float, *, true: float = 0.0, rule: Any = "last", their_n: int = 1,
             statistic: Any = "mean", rounded: float = 0.01) -> tuple[float, Counter[str]]:  # fmt: skip
    """Rows of n runs each, `true` points from the published ones, which have 8 % at the last epoch: the share of
    families in which a row is called better or worse, and the words of all rows."""
    draw = np.random.default_rng(n * 1000 + int(100 * std))
    wrong, words = 0, Counter[str]()
    for _ in range(families):
        last = draw.normal(8.0 + true, std, (ROWS, n)).round(2)
        best = last - np.abs(draw.normal(0.08, 0.04, (ROWS, n))).round(2)
        theirs = draw.normal(8.0, std, (ROWS, their_n))
        chosen = np.median(theirs, 1) if statistic == "median" else theirs.mean(1)
        if rule == "unstated":  # and it was a best one
            chosen = chosen - 0.08
        judged = []
        for i in range(ROWS):
            published = replace(
                PUBLISHED, error=float(np.round(chosen[i] / rounded) * rounded), rule=rule, n=their_n,
                statistic=statistic, rounded=rounded,
            )  # fmt: skip
            judged.append(judge(published, last[i].tolist(), best[i].tolist()))
        adjust(judged)
        found = Counter(each.word for each in judged if each.word)
        wrong += bool(found["better"] + found["worse"])
        words.update(found)
    return wrong / families, words


@pytest.mark.parametrize(
    ("n", "std", "more"),
    [
        (3, 0.2, {}), (5, 0.3, {}), (20, 0.3, {}), (5, 0.2, {"rule": "unstated"}),
        (5, 0.3, {"their_n": 5, "statistic": "median"}), (5, 0.2, {"rounded": 0.1}),
        (3, 0.45, {}), (3, 0.6, {}), (5, 1.0, {}), (3, 1.5, {}), (3, 0.6, {"rule": "unstated"}),
    ],
)  # fmt: skip
def test_a_family_of_17_rows_has_a_false_verdict_in_5_percent_at_most(
    n: int, std: float, more: dict[str, Any]
) -> None:
    wrong, _ = simulate(400 if std > 0.3 else 1_000, n, std, **more)
    assert wrong <= 0.05


@pytest.mark.parametrize(("n", "std"), [(3, 0.1), (3, 0.2), (5, 0.2), (5, 0.3), (10, 0.3)])
def test_a_difference_of_one_point_is_called_consistent_in_10_percent_at_most(n: int, std: float) -> None:
    _, words = simulate(300, n, std, true=1.0)
    assert words["consistent"] <= 0.10 * words.total()
    assert words["better"] == 0


def test_runs_like_theirs_are_mostly_consistent_and_unlike_ones_found() -> None:
    _, words = simulate(60, 5, 0.2)
    assert words["consistent"] > 0.7 * words.total()
    _, words = simulate(60, 5, 0.2, true=2.0)
    assert words["worse"] > 0.99 * words.total()


def test_the_verdict_and_the_interval_beside_it_agree() -> None:
    draw = np.random.default_rng(0)
    judged = [
        judge(PUBLISHED, draw.normal(8.0 + true, std, n).tolist())
        for true in (0.0, 0.3, 0.6, 1.5) for std in (0.05, 0.2, 0.5) for n in (3, 5, 10) for _ in range(20)
    ]  # fmt: skip
    adjust(judged)
    assert {each.word for each in judged} == {"worse", "consistent", "cannot tell"}
    for each in judged:
        assert each.half is not None
        if each.word == "consistent":
            assert abs(each.difference) <= each.half <= MAX_HALF_WIDTH
        elif each.word in ("better", "worse"):
            assert abs(each.difference) > each.half


def test_one_published_value_is_one_more_run() -> None:
    """By hand: the t-test of a prediction, with the moderated variance."""
    errors = [8.1, 8.4, 8.2, 8.7, 8.3]
    each = judge(PUBLISHED, errors)
    variance, _ = moderated(mean(errors), std(errors), len(errors), 10_000)
    error = math.sqrt(variance * (1 / 5 + 1) + 0.01**2 / 12)
    assert each.difference == pytest.approx(0.34)
    assert each.half == pytest.approx(stats.t.ppf(0.95, 12) * error)
    assert each.p == pytest.approx(2 * stats.t.sf(0.34 / error, 12))
    for statistic, runs in (("mean", 5), ("median", 3.49)):
        several = judge(replace(PUBLISHED, n=5, statistic=statistic), errors)  # type: ignore[arg-type]
        error = math.sqrt(variance * (1 / 5 + 1 / runs) + 0.01**2 / 12)
        assert several.half == pytest.approx(stats.t.ppf(0.95, 12) * error)


def test_a_published_spread_is_theirs() -> None:
    he2015 = replace(PUBLISHED, error=6.61, std=0.16, n=5)  # arXiv:1512.03385, table 6, depth 110
    wide = replace(he2015, std=0.5)
    ours = [6.2, 6.3, 6.1, 6.25]
    narrow_p, wide_p = judge(he2015, ours).p, judge(wide, ours).p
    assert narrow_p is not None
    assert wide_p is not None
    assert narrow_p < 0.02
    assert wide_p > 2 * narrow_p


def test_where_the_epoch_is_not_stated_both_must_agree() -> None:
    unstated, last = replace(PUBLISHED, rule="unstated", error=7.0), [8.0, 8.05, 7.95, 8.0, 8.0]
    worse, unclear = (judge(unstated, last, [e - down for e in last]) for down in (0.1, 0.9))
    for alone in (worse, unclear):
        adjust([alone])
    assert (worse.word, unclear.word) == ("worse", "cannot tell")


def test_equal_runs_do_not_pass_for_certainty() -> None:
    """A run stored three times under other seeds."""
    each = judge(PUBLISHED, [8.3, 8.3, 8.3])
    adjust([each])
    assert each.p is not None
    assert each.word != "worse"
    assert each.p > 0.1


def test_holm_counts_all_rows_of_the_table() -> None:
    runs = [make_run(s, 7.62 + s / 100) for s in range(5)]
    (alone,) = summarise(runs)
    others = [make_run(s, e, depth=d) for d, e in ((32, 7.2), (56, 6.3), (110, 6.0)) for s in range(5)]
    among = next(row for row in summarise([*runs, *others]) if row.depth == 20)
    assert alone.against is not None
    assert among.against is not None
    assert alone.against.p == among.against.p
    assert alone.against.adjusted is not None
    assert among.against.adjusted == pytest.approx(4 * alone.against.adjusted)
    assert (alone.against.word, among.against.word) == ("better", "cannot tell")


def test_a_row_is_judged_by_the_scatter_of_the_others() -> None:
    quiet = judge(PUBLISHED, [8.9, 8.91, 8.92])
    wild = [judge(PUBLISHED, [8.0 - x, 8.0, 8.0 + x]) for x in (1.0, 1.1, 1.2)]
    alone = quiet.half
    adjust([quiet])
    assert (quiet.word, quiet.half, quiet.others) == ("worse", alone, 1.0)
    adjust([quiet, *wild])
    assert alone is not None
    assert quiet.half is not None
    assert quiet.half > 3 * alone
    assert quiet.word == "cannot tell"
    few, many = (seeds_to_tell(PUBLISHED, quiet.errors, others) for others in (1.0, 1.5))
    assert few is not None
    assert many is None or many > few


def test_the_seeds_that_would_tell() -> None:
    errors = [8.3, 8.5, 8.1]
    n = seeds_to_tell(PUBLISHED, errors)
    assert n is not None
    assert n > 3
    scattered = [8.0, 9.0, 10.0]
    assert seeds_to_tell(PUBLISHED, scattered) is None
    variance, _ = moderated(mean(errors), std(errors), len(errors), 10_000)
    for runs, enough in ((n, True), (n - 1, False)):
        half = stats.t.ppf(0.95, 8 + runs - 1) * math.sqrt(variance * (1 / runs + 1) + 0.01**2 / 12)
        assert (half <= MAX_HALF_WIDTH) == enough
    assert seeds_to_tell(replace(PUBLISHED, std=3.0, n=3), errors) is None, "their own spread alone is wider"


def test_why_and_files_count_the_same_seeds() -> None:
    """By the scatter of the other rows, as the interval beside it."""
    wild = [make_run(s, 8 + s, depth=d) for d in (32, 56, 110) for s in range(3)]
    rows = summarise([*wild, *(make_run(s, 8.3 + s / 10) for s in range(3))])
    (row,) = [row for row in rows if row.depth == 20]
    assert row.against is not None
    assert row.against.others > 1
    assert seeds_to_tell(row.against.published, row.against.errors) is not None
    assert find(row, "against.seeds_to_tell") is None
    assert "no number of seeds would narrow it to ±0.5 points if they scatter as these do" in why(row)


def test_seeds_that_were_added_for_their_spread_do_not_count_in_it() -> None:
    """It was said that five seeds would narrow an interval that ten had left wide."""
    errors = [7.9, 8.6, 8.2, 8.0, 8.6, *[8.25] * 5]
    each = judge(PUBLISHED, errors, planned=5)
    assert each.half is not None
    assert each.half > MAX_HALF_WIDTH
    assert each.seeds_to_tell is None


@pytest.mark.parametrize(
    ("std", "n", "least", "most"),
    [(0.2, 3, 0.85, 0.9), (0.2, 10, 0.87, 0.95), (0.3, 3, 0.54, 0.62), (0.3, 5, 0.44, 0.53), (0.6, 3, 0.13, 0.2), (1.0, 3, 0, 0.12)],
)  # fmt: skip
def test_how_often_so_many_seeds_are_enough(std: float, n: int, least: float, most: float) -> None:
    """The forecast holds if further runs scatter as the first did: where they scatter by more than the images explain, only rows
    that lie together by chance are told a number."""
    draw, told, enough = np.random.default_rng(0), 0, 0
    for _ in range(4_000):
        first = draw.normal(8.0, std, n).round(2).tolist()
        seeds = seeds_to_tell(PUBLISHED, first)
        if seeds is None or seeds <= n:
            continue
        each = judge(PUBLISHED, first + draw.normal(8.0, std, seeds - n).round(2).tolist())
        told, enough = told + 1, enough + ((each.half or math.inf) <= MAX_HALF_WIDTH)
    assert least * told <= enough <= most * told


NOT_DUE: dict[str, dict[str, Any]] = {
    "lr 0.05, theirs 0.1": {"lr": 0.05},  # a variant's function that has changed since: no overrides
    "bf16, theirs fp32": {"precision": "bf16"},
    "batch norm over 2 images a worker, theirs over 128": {"workers": 64},
}


@pytest.mark.parametrize("why", NOT_DUE)
def test_what_is_not_the_published_run_gets_no_verdict(why: str) -> None:
    (row,) = summarise([make_run(s, 8.3, **NOT_DUE[why]) for s in range(5)])
    assert row.against is not None
    assert (row.against.word, row.against.half, row.against.reason) == (None, None, why)
    page = " ".join(text([row], width=200).split())
    assert "not judged" in page
    assert f"no verdict: {why}" in page


def test_workers_with_synchronised_batch_norm_are_one_network() -> None:
    recipe = make_run(0).record.spec["recipe"] | {"batch_norm": "sync"}
    (row,) = summarise([make_run(s, 8.3, workers=4, recipe=recipe) for s in range(5)])
    assert row.against is not None
    assert row.against.word == "consistent"
    assert "batch norm over" not in text([row])
    (row,) = summarise([make_run(s, 8.3, workers=4) for s in range(5)])
    assert "batch norm over 32 images a worker" in text([row])


def test_two_seeds_are_too_few() -> None:
    (row,) = summarise([make_run(s, 8.3) for s in range(2)])
    assert row.against is not None
    assert row.against.reason == "fewer than 3 seeds"


def test_every_member_must_be_of_the_published_images() -> None:
    """Whatever comes first: other images split rows, and averaged over they are judged by nothing."""
    published = find_published("cifar10", "msra", 20)
    assert published is not None
    for first in (True, False):
        runs = [make_run(s, 8.3, original=first == (s < 3)) for s in range(6)]
        assert sorted(row.against is None for row in summarise(runs)) == [False, True]
        (row,) = summarise(runs, across=["original"])
        assert row.against is None
        assert not row.original
    for across in ("workers", "lr", "precision"):
        change: dict[str, Any] = {"workers": 2} if across == "workers" else {}
        change |= {"lr": 0.05} if across == "lr" else {"precision": "tf32"} if across == "precision" else {}
        runs = [make_run(s, 8.3, **(change if s > 2 else {})) for s in range(6)]
        (row,) = summarise(runs, across=["recipe.lr" if across == "lr" else across])
        assert row.against is None, "averaged over what makes a run what it is"


def test_the_note_says_what_the_published_runs_did_otherwise() -> None:
    """He et al. trained on 45,000 images: ours on all 50,000 are not the same."""
    published = find_published("cifar10", "he2015", 20)
    assert published is not None
    run = make_run(0)
    spec = {"variant": "he2015", "network": {"depth": 20},
            "recipe": {"duration": 64_000, "unit": "step", "milestones": [32_000, 48_000]}}  # fmt: skip

    def at(seed: int) -> Stored:
        whole = run.record.spec | spec | {"seed": seed}
        return Stored(run.record.model_copy(update={"spec": whole, "seed": seed, "variant": "he2015"}), run.folder)

    (row,) = summarise([at(seed) for seed in range(3)])
    assert row.against is not None
    assert row.against.reason == "val 0, theirs 5000"
    assert row.against.difference == pytest.approx(mean([8.4]) - 8.75)


@pytest.mark.parametrize(
    ("val", "why"),
    [
        (5000, "theirs may be a best epoch, and the best on the test set is not known of ours"),
        (
            2500,
            "val 2500, theirs 5000; theirs may be a best epoch, and the best on the test set is not known of ours",
        ),
    ],
)
def test_the_published_runs_own_setting_keeps_the_comparison(val: int, why: str) -> None:
    """A footnote says "val 0, theirs 5000": with --val 5000 the test error stands beside theirs, and why it is not judged."""

    def at(seed: int, **changes: Any) -> Stored:
        record = make_record(seed, 8.8, **({"variants": ("he2015",), "val": val} | changes))
        assert record.result
        held_out = {"evaluated_on": "val", "evaluated_images": val, "test_images": 10_000, "test_error": 9.0}
        result = record.result.model_copy(update=held_out)
        return Stored(record.model_copy(update={"result": result}), Path(record.name))

    (row,) = summarise([at(seed) for seed in range(3)])
    assert row.fields["overrides"] == f"val={val}"
    assert row.against is not None
    assert row.against.difference == pytest.approx(9.0 - 8.75)
    assert row.against.reason == why
    assert "8.75 (+0.25)" in text([row])
    others: list[dict[str, Any]] = [{"settings": ("lr=0.05",)}, {"epochs": 9}, {"variants": ("msra",)}]
    for other in others:
        (row,) = summarise([at(seed, **other) for seed in range(3)])
        assert row.against is None, other
