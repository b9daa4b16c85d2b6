"""Two sides against each other: which rows are compared, what is said of them, what CI fails on; and `why`."""

import itertools
import json
import math
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import make_epoch
from scipy import stats
from test_table import make_run

from harness.results.compare import (
    Comparison,
    Condition,
    Pair,
    Side,
    check_conditions,
    compare,
    compare_by,
    compare_errors,
    judge,
    nearest,
    parse_fail_on,
    signed,
)
from harness.results.explain import why
from harness.results.metrics import METRICS, Figure
from harness.results.report.table import render_comparison
from harness.results.rows import Row, summarise
from harness.results.statistics import mean, prior_std, scatter, squared_spread
from harness.results.store import Stored, finish, load_records, write_epochs
from harness.results.values import Failure, Measurement, Record


def make_rows(errors: list[float], seconds: list[float], **changes: Any) -> list[Row]:
    result = changes.pop("result", {})
    runs = [
        make_run(seed, error, result={"epoch_seconds": time, **result}, **changes)
        for seed, (error, time) in enumerate(zip(errors, seconds, strict=True))
    ]
    return summarise(runs)


def scatter_of(rows: Iterable[tuple[list[float], int]]) -> float:
    """Of errors and their images."""
    return scatter(itertools.starmap(squared_spread, rows))


BASE = [8.30, 8.35, 8.40, 8.45, 8.50], [4.50, 4.51, 4.52, 4.53, 4.54]


def at(rows: list[Row], *hours: float) -> list[Row]:
    """The same runs, each begun at its hour."""
    (row,) = rows
    moved = [run.record.model_copy(update={"started_at": run.record.started_at + timedelta(hours=h),
                                           "finished_at": run.record.started_at + timedelta(hours=h + 0.1)})
             for run, h in zip(row.done, hours, strict=True)]  # fmt: skip
    return summarise([Stored(record, Path("runs") / str(n)) for n, record in enumerate(moved)])


def test_the_same_within_the_margins() -> None:
    """Errors by the moderated spread; the interval that is shown is the one that the verdict follows from."""
    one, two = [8.3, 8.35, 8.4, 8.45, 8.5] * 2, [8.31, 8.45, 8.41, 8.36, 8.51] * 2
    (pair,) = compare(make_rows(one, [4.5] * 10), make_rows(two, [4.5] * 10, loader="dataloader"))
    error, time = pair.figures
    assert pair.differs == {"loader": ("dali", "dataloader")}
    assert error.how == "Welch, moderated variance"
    assert error.difference == pytest.approx(0.008)
    assert error.interval is not None
    assert -0.2 < error.interval.low < 0 < error.interval.high < 0.2
    assert error.verdict == "equivalent"
    few = judge(METRICS["error"], *make_rows([8.4, 8.5], [4.5] * 2), *make_rows([8.4] * 3, [4.5] * 3))
    assert (few.how, few.verdict) == ("fewer than 3 runs on a side", "cannot tell")
    assert time.difference == pytest.approx(0)


def measured(errors: Iterable[float], seeds: Iterable[int] = range(5)) -> Side:
    return [(Record.model_construct(seed=s, added_until=None), e) for s, e in zip(seeds, errors, strict=True)]


def test_seeds_that_go_together_are_paired() -> None:
    a = [8.0, 8.2, 8.4, 8.6, 8.8]
    near = [value + d for value, d in zip(a, (0.1, 0.12, 0.08, 0.1, 0.11), strict=True)]
    paired, how = compare_errors([measured(a), measured(near)], 10_000)
    test = stats.ttest_rel(near, a).confidence_interval(0.9)
    assert how == "paired t-test, by seed"
    assert paired is not None
    assert paired.interval() == pytest.approx((test.low, test.high))
    for other in (range(1, 6), (0, 1, 2, 3, 3)):
        assert "Welch" in compare_errors([measured(a), measured(near, other)], 10_000)[1]
    assert "Welch" in compare_errors([measured(a), measured([8.3, 8.9, 8.1, 8.7, 8.5])], 10_000)[1]


def test_seeds_that_go_opposite_ways_are_not_paired() -> None:
    """A correlation of -1 has no t."""
    a, b = [8.0, 8.25, 8.5, 8.75], [8.75, 8.5, 8.25, 8.0]
    test, how = compare_errors([measured(a, range(4)), measured(b, range(4))], 10_000)
    assert "Welch" in how
    assert test is not None
    assert test.value == pytest.approx(0)


def test_of_several_values_each_pair_is_one_of_all() -> None:
    """`--by` with four values: seeds are paired by the evidence of three pairs, and each row's scatter counts once."""
    a, near = [8.0, 8.3, 8.6, 8.9, 9.2], [8.0, 8.3, 8.6, 9.2, 8.9]
    assert 0.025 / 3 < stats.pearsonr(a, near, alternative="greater").pvalue < 0.025
    quiet = [8.0, 8.1, 8.2, 8.1, 8.0]
    sides = {"dali": a, "dataloader": near, "resident": quiet, "synthetic": quiet}
    rows = [row for loader, errors in sides.items() for row in make_rows(errors, [4.5] * 5, loader=loader)]

    def first(chosen: str) -> Comparison:
        return next(pair.figures[0] for pair in compare_by(rows, chosen) if pair.figures)

    assert first("loader=dali,dataloader").how == "paired t-test, by seed"
    among = first("loader")
    assert "Welch" in among.how
    expected = scatter_of([(errors, 10_000) for errors in sides.values()])
    alone = compare_errors([measured(a), measured(near)], 10_000, expected, 3)[0]
    assert alone is not None
    assert among.interval == pytest.approx(alone.interval())


def test_the_scatter_is_of_each_rows_own_images() -> None:
    """360 images of digits, 10,000 of CIFAR-10; a run that diverged tells nothing."""
    digits, cifar = (list(prior_std(8.0, n) * np.arange(-1.5, 2) + 8.0) for n in (360, 10_000))
    expected = scatter_of([(cifar, 10_000)])
    assert expected > 1
    assert scatter_of([(digits, 360), (cifar, 10_000)]) == pytest.approx(expected)
    wild = [8.0, 9.0, 10.0, 8.0]
    known = [(wild, 10_000), (wild, 10_000), (cifar, 10_000)]
    assert scatter_of([*known, ([math.inf, *wild], 10_000)]) == scatter_of(known)


def test_times_are_compared_as_ratios_and_bear_outliers() -> None:
    slower = [5.0, 5.1, 5.2, 5.0, 15.1]
    one, two = make_rows(*BASE), make_rows(BASE[0], slower)
    (pair,) = compare(at(one, 0, 4, 8, 12, 16), at(two, 2, 6, 10, 14, 18))  # a session each
    time = pair.figures[1]
    assert time.interval is not None
    assert time.difference == pytest.approx(100 * (np.median(slower) / np.median(BASE[1]) - 1))
    assert 9 < time.interval.low < time.difference < time.interval.high < 235
    assert time.verdict == "different"
    (back,) = compare(at(two, 2, 6, 10, 14, 18), at(one, 0, 4, 8, 12, 16))
    assert back.figures[1].verdict == "different", "neither side is favoured"


@pytest.mark.parametrize("metric", [name for name, metric in METRICS.items() if metric.better])
def test_the_difference_is_that_of_the_two_figures_beside_it(metric: str) -> None:
    """Whatever the runs: A, B, B - A, interval and verdict are one statement, and A and B are those of `report`."""
    draw = np.random.default_rng(0)
    known = {"top5_error": "final_top5_error"}
    for n in (3, 4, 6, 9):
        sides = []
        for _ in range(2):
            values = 10 * np.exp(0.05 * draw.standard_normal(n)) * np.where(draw.random(n) < 0.3, 2, 1)
            if metric.endswith("mib"):
                none = make_run(0).record.result
                assert none is not None
                changes = [
                    {"memory": none.memory.model_copy(update={metric: Measurement(value=v)})} for v in values
                ]
            else:
                field = known.get(metric, METRICS[metric].record_name)
                changes = [
                    {field: Measurement(value=v) if metric == "energy_joules" else v} for v in values.tolist()
                ]
            if metric == "mfu":  # made of others
                changes = [{"forward_flops": 1, "peak_flops": 300 * 11_111 / v} for v in values.tolist()]
            sides += summarise([make_run(seed, result=change) for seed, change in enumerate(changes)])
        figure = judge(METRICS[metric], *sides)
        assert figure.a.value == sides[0].figures[metric].value
        assert figure.b.value == sides[1].figures[metric].value
        assert figure.a.value is not None
        assert figure.b.value is not None
        points, percent = figure.b.value - figure.a.value, 100 * (figure.b.value / figure.a.value - 1)
        assert figure.difference == pytest.approx(percent if METRICS[metric].relative else points)
        assert figure.interval is not None
        assert figure.interval.low <= figure.difference <= figure.interval.high


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.9517, "equivalent"), (0.948, "different"), (1.0483, "equivalent"), (0.95, "cannot tell")],
)
def test_the_verdict_follows_from_the_interval_and_the_margin_that_are_shown(share: float, verdict: str) -> None:
    one, two = (make_rows([8.0] * 5, [s * (1 + k / 5000) for k in range(5)]) for s in (4.0, 4.0 * share))
    (pair,) = compare(at(one, 0, 4, 8, 12, 16), at(two, 2, 6, 10, 14, 18))  # a session each
    assert pair.figures[1].verdict == verdict


def test_one_session_each_is_said_and_widens_the_interval() -> None:
    one, two = make_rows(*BASE), make_rows(BASE[0], [v * 1.02 for v in BASE[1]])
    (pair,) = compare(at(one, 0, 0.1, 0.2, 0.3, 0.4), at(two, 2, 2.1, 2.2, 2.3, 2.4))
    time = pair.figures[1]
    assert time.how.endswith("; one session each, assumed to differ by ±7 %")
    assert time.interval is not None
    assert time.interval.low == pytest.approx(2 - 7, abs=1)
    assert time.interval.high == pytest.approx(2 + 7.2, abs=1)
    assert "one session each" in render_comparison([pair])
    (turns,) = compare(at(one, 0, 0.2, 0.4, 0.6, 0.8), at(two, 0.1, 0.3, 0.5, 0.7, 0.9))  # turn by turn
    assert "session" not in turns.figures[1].how
    (days,) = compare(at(one, 0, 0.1, 24, 48, 48.1), at(two, 72, 96, 96.1, 120, 120.2))
    assert days.figures[1].how.endswith(", over 3 and 3 sessions")


@pytest.mark.parametrize(("spread", "least", "most"), [(0.01, 0.98, 1), (0.03, 0.86, 0.94), (0.05, 0.6, 0.74)])
def test_one_session_each_is_known_only_as_far_as_sessions_scatter_by_three_percent(
    spread: float, least: float, most: float
) -> None:
    """The interval of seconds where nothing has changed, and `epoch_seconds>5%`: an assumption, which the runs cannot check."""
    draw, condition, held, failed = np.random.default_rng(0), parse_fail_on("epoch_seconds>5%"), 0, 0
    for sessions in spread * draw.standard_normal((300, 2)):
        seconds = np.exp(sessions[:, None] + 0.01 * draw.standard_normal((2, 3))).tolist()
        a, b = (at(make_rows([8.0] * 3, side), *hours) for side, hours in
                zip(seconds, ((0, 0.1, 0.2), (4, 4.1, 4.2)), strict=True))  # fmt: skip
        figure = judge(METRICS["epoch_seconds"], *a, *b)
        assert figure.interval is not None
        held += figure.interval.low <= 0 <= figure.interval.high
        failed += bool(check_conditions([Pair(None, None, {}, (figure,))], condition).failed)
    assert least * 300 <= held <= most * 300
    assert failed <= 0.08 * 300 or (spread == 0.05 and 0.1 * 300 <= failed <= 0.2 * 300)


def test_nothing_can_be_said_of_few_seconds_and_missing_figures() -> None:
    (pair,) = compare(make_rows([8.3], [4.5]), make_rows([8.3], [4.5], result={"epoch_seconds": None}))
    error, time = pair.figures
    assert (error.difference, error.how, error.verdict) == (None, "fewer than 3 runs on a side", "cannot tell")
    assert (time.difference, time.interval, time.verdict) == (None, None, "cannot tell")
    assert "not measured on both sides" in render_comparison([pair])
    (pair,) = compare(make_rows([8.3] * 2, [4.5] * 2), make_rows([8.3] * 3, [9.0] * 3))
    assert (pair.figures[1].test, pair.figures[1].how) == (None, "fewer than 3 runs on a side")


def test_seconds_with_outliers_by_simulation() -> None:
    """Runs scatter by 1 %, one in ten is 1.3 to 2 times slow, a session each: a true 10 % is rarely missed."""
    draw, told, size = np.random.default_rng(0), 0, 0
    for truth in (1.1, 1.0) * 150:
        sides = np.exp(0.01 * draw.standard_normal((2, 10)))
        sides *= np.where(draw.random((2, 10)) < 0.1, draw.uniform(1.3, 2, (2, 10)), 1)
        sides[1] *= truth
        a, b = (at(make_rows([8.0] * 10, list(side)), *hours) for side, hours in
                zip(sides, (range(0, 40, 4), range(2, 42, 4)), strict=True))  # fmt: skip
        interval = judge(METRICS["epoch_seconds"], *a, *b).interval
        assert interval is not None
        told += truth > 1 and interval.low > 0
        size += truth == 1 and interval.low > 0
    assert told >= 0.9 * 150
    assert size <= 0.09 * 150  # 5 % and the simulation's own error


def names(pairs: list[Pair]) -> list[tuple[str, str, str, str]]:
    return [(p.a.name, p.b.name, p.a.fields["loader"], p.b.fields["loader"]) for p in pairs if p.a and p.b]


def test_rows_are_paired_by_all_that_varies_on_both_sides() -> None:
    one = summarise([make_run(depth=d, loader=x) for d in (20, 56) for x in ("dali", "resident")])
    two = summarise([make_run(depth=d, loader=x, torch="2.11") for d in (20, 56) for x in ("dali", "resident")])
    assert names(compare(one, two)) == [
        ("msra-20", "msra-20", "dali", "dali"), ("msra-20", "msra-20", "resident", "resident"),
        ("msra-56", "msra-56", "dali", "dali"), ("msra-56", "msra-56", "resident", "resident"),
    ]  # fmt: skip
    single = summarise([make_run(depth=20, loader="dataloader")])
    assert names(compare(one, single)) == [
        ("msra-20", "msra-20", "dali", "dataloader"), ("msra-20", "msra-20", "resident", "dataloader"),
    ]  # fmt: skip
    other = summarise([make_run(depth=56)])
    assert names(compare(single, other)) == [
        ("msra-20", "msra-56", "dataloader", "dali")
    ]  # asked for: nothing else


def test_a_value_that_one_side_lost_is_not_compared_with_another() -> None:
    one = summarise([make_run(precision=p) for p in ("fp32", "bf16")])
    two = summarise([make_run(precision="fp32")])
    pairs = compare(one, two)
    assert [(p.a and p.a.text("precision"), p.b and p.b.text("precision")) for p in pairs] == [
        ("bf16", None),
        ("fp32", "fp32"),
    ]


def test_the_union_of_rows_is_compared() -> None:
    failure = Failure(kind="OOM", message="")
    one = summarise([make_run(s, depth=d) for d in (20, 56) for s in (0, 1)])
    two = summarise(
        [make_run(0, depth=20), *(make_run(s, depth=56, failure=failure) for s in (0, 1)), make_run(depth=32)]
    )
    pairs = compare(one, two)
    assert [(p.a and p.a.name, p.b and p.b.name) for p in pairs] == [
        ("msra-20", "msra-20"), ("msra-56", "msra-56"), (None, "msra-32")
    ]  # fmt: skip
    gate = check_conditions(pairs, parse_fail_on("error>+5"))
    assert gate.failed == ["msra-56 cifar10: 2 failed in B (OOM, OOM), 0 in A"]
    text = render_comparison(pairs)
    assert "no result in B" in text
    assert "no result in A" in text
    assert "msra-56 cifar10: 2 failed in B (OOM, OOM), 0 in A" in text
    gone = check_conditions(compare(one, summarise([make_run(0)])), parse_fail_on("error>+5"))
    assert gone.failed == ["msra-56 cifar10: has no counterpart in B"]
    assert check_conditions([], parse_fail_on("error>5")).failed == ["no two rows could be compared"]


def test_diverged_seeds_fail_and_those_that_failed_before_do_not() -> None:
    def side(*failed: int) -> list[Row]:
        return summarise(
            [make_run(s, failure=Failure(kind="NaN", message="") if s in failed else None) for s in range(5)]
        )

    def failed(a: list[Row], b: list[Row]) -> list[str]:
        return check_conditions(compare(a, b), parse_fail_on("error>+1")).failed

    assert failed(side(), side(1, 2, 3)) == ["msra-20 cifar10: 3 failed in B (NaN, NaN, NaN), 0 in A"]
    assert failed(side(1), side(3)) == []
    infinite = summarise([make_run(0, math.inf), *(make_run(s) for s in (1, 2))])
    assert failed(side(), infinite) == ["msra-20 cifar10: 1 failed in B (NaN), 0 in A"]


def test_unlike_machines_and_versions_fail_unless_overlooked() -> None:
    one, two = make_rows(*BASE), make_rows(*BASE, torch="2.11.0")
    pairs = compare(one, two)
    gate = check_conditions(pairs, parse_fail_on("error>+1"))
    assert gate.failed == ["msra-20 cifar10: unlike torch: 2.15.0+cu130 → 2.11.0 (--across 'torch' overlooks it)"]
    drivers = [make_rows(*BASE, result={"machine": {"driver": d, "host": d}}) for d in ("580.1", "590.2")]
    gate = check_conditions(compare(*drivers), parse_fail_on("error>+1"))
    assert gate.failed == ["msra-20 cifar10: unlike driver: 580.1 → 590.2 (--across 'driver' overlooks it)"]
    assert "unlike driver" in render_comparison(compare(*drivers))
    chosen = make_rows(*BASE, loader="resident")
    assert check_conditions(compare(one, chosen), parse_fail_on("error>+1")).failed == []
    both = summarise([run for row in (*one, *two) for run in row.done])
    assert check_conditions(compare_by(both, "torch"), parse_fail_on("error>+1")).failed == []


def test_compare_by_a_field_inside_one_folder() -> None:
    rows = summarise([make_run(depth=d, workers=w) for d in (20, 56) for w in (1, 2, 8)] + [make_run(depth=32)])
    pairs = compare_by(rows, "workers")
    assert [(p.name, p.differs) for p in pairs if p.figures] == [
        ("msra-20 cifar10", {"workers": ("1", "2")}), ("msra-56 cifar10", {"workers": ("1", "2")}),
        ("msra-20 cifar10", {"workers": ("1", "8")}), ("msra-56 cifar10", {"workers": ("1", "8")}),
    ]  # fmt: skip
    assert [p.a and p.a.name for p in pairs if p.b is None] == ["msra-32"] * 2
    with pytest.raises(ValueError, match="field 'worker' is unknown; did you mean workers"):
        compare_by(rows, "worker")
    with pytest.raises(ValueError, match="all runs have loader dali"):
        compare_by(rows, "loader")


def test_what_keeps_rows_apart_is_named() -> None:
    rows = summarise([make_run(loader="dali", lr=0.1), make_run(loader="resident", lr=0.2)])
    pairs = compare_by(rows, "loader")
    assert [pair.figures for pair in pairs] == [(), ()]
    assert nearest(pairs) == ["loader", "recipe.lr"]


def test_the_first_value_is_the_baseline() -> None:
    rows = summarise([make_run(precision=p) for p in ("bf16", "fp16", "fp32")])
    (pair,) = compare_by(rows, "precision=fp32,bf16")
    assert pair.differs == {"precision": ("fp32", "bf16")}
    with pytest.raises(ValueError, match=r"precision 'fp8' is unknown \(allowed: bf16, fp16, fp32\)"):
        compare_by(rows, "precision=fp8")
    with pytest.raises(ValueError, match="all runs have precision fp32"):
        compare_by(rows, "precision=fp32")


def test_by_workers_where_threads_follow_from_it() -> None:
    rows = summarise([make_run(workers=w, result={"threads": 8 // w}) for w in (1, 4)])
    (pair,) = compare_by(rows, "workers")
    assert pair.differs == {"threads": ("8", "2"), "workers": ("1", "4")}
    assert list(pair.problems()) == []
    drivers = [
        make_run(torch=t, result={"machine": {"cuda": c, "driver": "580"}})
        for t, c in (("2.11.0", "12"), ("2.15.0", "13"))
    ]
    (pair,) = compare_by(summarise(drivers), "torch")
    assert list(pair.problems()) == [], "CUDA comes with torch"
    # not where runs of one width differ in them
    rows = summarise([make_run(workers=w, result={"threads": t}) for w, t in ((1, 8), (1, 2), (4, 2))])
    assert [p.differs for p in compare_by(rows, "workers") if p.figures] == [{"workers": ("1", "4")}]


def test_other_images_are_refused() -> None:
    one = make_rows(*BASE)
    for other in ({"dataset": "digits"}, {"limit_test": 100}, {"fingerprint": "0" * 64}):
        with pytest.raises(
            ValueError, match=r"^A and B were evaluated on different images \(\w+ .* → .*: not comparable$"
        ):
            compare(one, make_rows(*BASE, **other))
    with pytest.raises(ValueError, match="different images"):
        compare_by(one, "fingerprint")


def test_runs_without_a_result_are_not_rows_of_a_comparison() -> None:
    failed = summarise([make_run(failure=Failure(kind="OOM", message=""))])
    assert [(p.a is None, p.figures) for p in compare(failed, make_rows(*BASE))] == [(False, ())]
    assert compare(failed, failed) == []
    assert render_comparison([]).startswith("nothing to compare")


def test_conditions_are_read() -> None:
    assert parse_fail_on("error>+0.3, epoch_seconds>5%,images_per_second<-2.5%") == [
        Condition("error", True, 0.3, False),
        Condition("epoch_seconds", True, 5.0, True),
        Condition("images_per_second", False, -2.5, True),
    ]
    assert ",".join(map(str, parse_fail_on("error>0.3,rss_mib>10%"))) == "error>+0.3,rss_mib>+10%"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read ''"),
        ("error", "cannot read 'error'"),
        ("error>", "cannot read"),
        ("error>1,", "cannot read ''"),
        ("error>=1", "cannot read"),
        ("error>1e9999", "cannot read"),
        ("error>nan", "cannot read"),
        ("eror>1", "metric 'eror' is unknown; did you mean error"),
        ("__import__('os')>1", "cannot read"),
    ],
)
def test_conditions_that_do_not_parse(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse_fail_on(text)
    assert words in str(caught.value)


def gate(condition: str, a: list[Row], b: list[Row]) -> tuple[list[str], list[str]]:
    conditions = parse_fail_on(condition)
    return tuple(check_conditions(compare(a, b, [c.metric for c in conditions]), conditions))  # type: ignore[return-value]


def test_conditions_test_the_interval() -> None:
    a, b = make_rows([8.0, 8.2, 8.1, 8.0], [4.0] * 4), make_rows([8.7, 8.5, 8.6, 8.5], [4.4] * 4)
    assert gate("error>+0.3", a, b) == (["msra-20 cifar10: error>+0.3 fails: +0.50 (+0.22 … +0.78) points"], [])
    assert gate("error>+0.9", a, b) == ([], [])
    assert gate("error>+0.6", a, b) == (
        [],
        ["msra-20 cifar10: error>+0.6 cannot tell: +0.50 (+0.22 … +0.78) points"],
    )
    assert gate("error>3%", a, b)[0] == [
        "msra-20 cifar10: error>+3% fails: +0.50 (+0.22 … +0.78) points"
    ]  # 0.24 points
    assert gate("error<-0.3", b, a)[0] == ["msra-20 cifar10: error<-0.3 fails: −0.50 (−0.78 … −0.22) points"]
    assert gate("error<-0.3", a, b) == ([], [])
    assert gate("epoch_seconds>5%", a, b)[0] == [
        "msra-20 cifar10: epoch_seconds>+5% fails: +10.00 (+2.69 … +17.83) %"
    ]
    assert gate("epoch_seconds>0.2", a, b)[0][0].startswith("msra-20 cifar10: epoch_seconds>+0.2 fails")
    assert gate("epoch_seconds>20%", a, b) == ([], [])
    assert gate("epoch_seconds<-200%", a, b) == ([], [])
    assert gate("error>5%", make_rows([0.0] * 4, [4.0] * 4), b)[1] == [
        "msra-20 cifar10: error>+5% cannot tell: A is 0"
    ]
    assert gate("top5_error>1", a, b)[0] == [
        "msra-20 cifar10: top5_error>+1 cannot be checked, top5_error was not measured on both sides"
    ]
    few = make_rows([8.0], [4.0])
    assert gate("epoch_seconds>5%", few, few)[1] == [
        "msra-20 cifar10: epoch_seconds>+5% cannot tell: fewer than 3 runs on a side"
    ]


def compared(a: Side, b: Side, *known: Any) -> Comparison:
    """Two sides' errors, with the figures of `report`."""
    figures = [Figure(mean([error for _, error in side]), n=len(side)) for side in (a, b)]
    return Comparison(METRICS["error"], *figures, *compare_errors([a, b], 10_000, *known))


@pytest.mark.parametrize(
    ("std", "truth", "rows", "least", "most"),
    [
        (0.2, 0.0, 1, 0, 0.05), (0.2, 0.5, 1, 0.9, 1), (0.2, 0.0, 17, 0, 0.05), (0.6, 0.0, 17, 0, 0.05),
        (1.5, 0.0, 1, 0, 0.055), (1.5, 0.0, 5, 0, 0.05), (1.5, 0.0, 17, 0, 0.05),
    ],
)  # fmt: skip
def test_the_gate_by_simulation(std: float, truth: float, rows: int, least: float, most: float) -> None:
    """error>+0.3 with five seeds a side: false alarms over all rows, and a true +0.5 that is found. An interval of 90 % beyond
    the limit is no failure by itself: one of 17 rows that scatter by 1.5 points had such a one in 20 %."""
    draw, condition = np.random.default_rng(0), parse_fail_on("error>+0.3")
    repeats = 300 if rows > 1 else 1000
    sides = np.round(8 + std * draw.standard_normal((repeats, rows, 2, 5)) + [[0], [truth]], 2).tolist()
    failed = 0
    for comparison in sides:
        spread = scatter_of([(errors, 10_000) for both in comparison for errors in both])
        pairs = [Pair(None, None, {}, (compared(*map(measured, both), spread, rows),)) for both in comparison]
        failed += bool(check_conditions(pairs, condition).failed)
    assert least <= failed / repeats <= most


def test_the_page_of_a_comparison() -> None:
    pairs = compare(make_rows(*BASE), make_rows([8.8, 8.9, 9.0, 8.9, 8.9], BASE[1], loader="dataloader"))
    page = render_comparison(pairs)
    assert page.splitlines()[:5] == [
        "B against A: loader dali → dataloader",
        "",
        "what             metric      n            A            B   B − A       interval  margin  verdict",
        "───────────────  ───────  ────  ───────────  ───────────  ──────  ─────────────  ──────  ───────────",
        "msra-20 cifar10  error %  5, 5  8.40 ± 0.08  8.90 ± 0.07   +0.50  +0.26 … +0.74    ±0.2  different",
    ]
    assert max(map(len, page.splitlines())) <= 100
    assert "\x1b[" in render_comparison(pairs, colour=True)
    assert "| msra-20 cifar10 |" in render_comparison(pairs, "markdown")
    values = json.loads(render_comparison(pairs, "json"))
    assert values["pairs"][0]["figures"][0]["difference"] == pytest.approx(0.5)


def test_a_disturbed_side_is_named() -> None:
    timing = {"epochs": 0, "fastest": None, "slowest": None}
    disturbed = make_rows([8.0], [9.0], result={"timing": timing, "interference": ("it swapped",)})
    pairs = compare(disturbed, make_rows([8.0], [4.5]))
    said = "A: no epoch was undisturbed (it swapped): the seconds are of disturbed ones"
    assert f"\nmsra-20 cifar10: {said}\n" in render_comparison(pairs, width=150)
    assert json.loads(render_comparison(pairs, "json"))["pairs"][0]["notes"] == [said]
    assert not check_conditions(pairs, parse_fail_on("error>+2")).failed


def test_the_intervals_hold_where_runs_scatter_by_more_than_the_images_explain() -> None:
    """90 %, whatever the spread beside that expected of 10,000 images; short trainings have several times it."""
    draw, expected = np.random.default_rng(0), prior_std(8.0, 10_000)
    for ratio, n in itertools.product((1.0, 2.0, 4.7), (3, 5)):
        held = 0
        for errors in draw.normal(8.0, ratio * expected, (1000, 2, n)).tolist():
            test, _ = compare_errors(
                [measured(side, range(k, k + n)) for k, side in zip((0, 9), errors, strict=True)], 10_000
            )
            assert test
            low, high = test.interval()
            held += low <= 0 <= high
        assert held >= 880, (ratio, n)


@pytest.mark.parametrize(
    ("images", "alike", "least", "most"),
    [(10_000, 1.0, 0.89, 1), (10_000, 0.9, 0.8, 0.87), (10_000, 0.5, 0.54, 0.62), (360, 1.0, 0.89, 1), (360, 0.9, 0.8, 0.87), (360, 0.5, 0.54, 0.62)],
)  # fmt: skip
def test_the_interval_is_of_the_difference_on_these_images(
    images: int, alike: float, least: float, most: float
) -> None:
    """And of that on all images of their kind as far as A and B fail on the same ones. Half of the variance of an error is of the images,
    half of the seed (K. Jordan, arXiv:2304.01910)."""
    draw, half, here, everywhere = np.random.default_rng(0), 100 * math.sqrt(0.08 * 0.92 / (2 * images)), 0, 0
    for _ in range(1_500):
        of_images = half * (
            math.sqrt(alike) * draw.standard_normal() + math.sqrt(1 - alike) * draw.standard_normal(2)
        )
        a, b = (8 + of_images[:, None] + half * draw.standard_normal((2, 10))).tolist()
        test, _ = compare_errors([measured(a, range(10)), measured(b, range(10))], images)
        assert test
        low, high = test.interval()
        here += low <= of_images[1] - of_images[0] <= high
        everywhere += low <= 0 <= high
    assert here >= 0.89 * 1_500
    assert least * 1_500 <= everywhere <= most * 1_500


def test_held_out_errors_are_named_and_the_test_set_is_compared_too() -> None:
    def rows(error: float) -> list[Row]:
        val = {"evaluated_on": "val", "evaluated_images": 2500, "test_images": 10_000, "warmup_epochs": 0}
        return summarise([make_run(s, 8.0, result=val | {"test_error": error + s / 10}) for s in range(3)])

    (pair,) = pairs = compare(rows(8.0), rows(9.5))
    names = [figure.metric.name for figure in pair.figures]
    assert names == ["error", "test_error", "epoch_seconds"]
    assert pair.figures[1].verdict == "different"
    page = render_comparison(pairs, width=200)
    assert "A: error % is of held-out training images, not of the test set" in page
    assert "B: from runs of one epoch: the seconds include the warm-up" in page


def test_a_recipes_field_is_compared_though_the_overrides_name_it() -> None:
    rows = []
    for lr in (0.1, 0.05):
        recipe = dict(make_run(0).record.spec["recipe"]) | {"lr": lr}
        own = {"overrides": [f"lr={lr}"] * (lr != 0.1), "recipe": recipe}
        rows += summarise([make_run(seed, **own) for seed in range(3)])
    (pair,) = compare_by(rows, "recipe.lr")
    assert pair.figures
    assert not list(pair.problems())


def test_differences_have_their_thousands_apart() -> None:
    assert [signed(value) for value in (1136.14, -1136.14, 0.004, -0.001)] == [
        "+1,136.14",
        "−1,136.14",
        "0.00",
        "0.00",
    ]


def test_rows_that_are_named_alike_are_told_apart() -> None:
    """By the fewest fields, in the table, its notes and the lines of --fail-on; by none where names suffice."""
    runs = [make_run(s, 8.0 + s / 10, loader=x) for x in ("dali", "resident") for s in range(3)]
    pairs = compare(summarise(runs), summarise(runs))
    assert [pair.name for pair in pairs] == [f"msra-20 cifar10 loader {loader}" for loader in ("dali", "resident")]
    assert "msra-20 cifar10 loader dali  " in render_comparison(pairs)
    widths = [make_run(s, 8.0 + s / 10, loader="dali", workers=2) for s in range(3)]
    pairs = compare_by(summarise([*runs, *widths]), "workers")
    assert [pair.name for pair in pairs if pair.b] == ["msra-20 cifar10 loader dali"]
    (by,) = compare_by(summarise(runs), "loader")
    assert by.name == "msra-20 cifar10"
    depths = [make_run(s, depth=d, loader=x) for x, d in (("dali", 20), ("resident", 32)) for s in range(3)]
    assert [p.name for p in compare(summarise(depths), summarise(depths))] == [
        "msra-20 cifar10",
        "msra-32 cifar10",
    ]


def test_disturbed_seconds_decide_nothing() -> None:
    timing = {"epochs": 0, "fastest": None, "slowest": None}
    busy = {"timing": timing, "interference": ("it swapped",)}
    errors, slow = [8.0, 8.1, 8.2], [9.0, 9.1, 9.2]
    for b, word in ((make_rows(errors, slow, result=busy), "cannot tell"), (make_rows(errors, slow), "different")):
        pairs = compare(make_rows(errors, [4.5, 4.6, 4.7]), b)
        (seconds,) = [figure for figure in pairs[0].figures if figure.metric.name == "epoch_seconds"]
        assert seconds.difference == pytest.approx(100 * (9.1 / 4.6 - 1))
        assert seconds.verdict == word
        busily = word == "cannot tell"
        assert ("cannot tell: disturbed epochs\n" in render_comparison(pairs, width=200)) == busily
        figures = json.loads(render_comparison(pairs, "json"))["pairs"][0]["figures"]
        assert [figure["disturbed"] for figure in figures] == [False, busily]
        gate = check_conditions(pairs, parse_fail_on("epoch_seconds>5%"))
        assert (len(gate.failed), len(gate.unclear)) == ((0, 1) if word == "cannot tell" else (1, 0))


def test_why_names_records_epochs_and_formula(tmp_path: Path) -> None:
    untimed: list[dict[str, Any]] = [
        {"untimed": "warm-up"},
        {},
        {},
        {},
        {"untimed": "interference: it swapped"},
        {},
    ]
    for seed in range(2):
        run = make_run(seed, 8.3 + 0.2 * seed)
        assert run.record.result is not None
        epochs = tuple(
            make_epoch(
                k,
                error=9.0 if k < 6 else 8.3 + 0.2 * seed,
                train_seconds=4.4 + 0.05 * k,
                timed=k in (2, 3, 4),
                **more,
            )
            for k, more in enumerate(untimed, 1)
        )
        result = run.record.result.model_copy(update={"epochs": epochs, "epoch_seconds": 4.55})
        finish(tmp_path, run.record.model_copy(update={"result": result}))
    runs = load_records([tmp_path]).records
    (row,) = summarise(runs)
    text = why(row)
    for words in (
        ": errors are of the test set\n",
        "error % 8.40 ± 0.14 = top-1 error after the last epoch, mean ± std (n − 1) over the seeds\n  seed 0: 8.30, seed 1: 8.50",
        f"seed 0: {runs[0].folder}",
        "best epoch 170", "published 8.29 %", "no verdict: fewer than 3 seeds",
        "3 epochs timed, 4.5 to 4.6 s; left out: 1 (warm-up), 1 (interference: it swapped), 1 (no known reason)\n",
        "NVML MiB 1,890", "network.depth = 20",
    ):  # fmt: skip
        assert words in text
    write_epochs(runs[0].folder, [make_epoch(1, error=7.0, train_seconds=1.0)])
    assert "but final_error is 8.3, its epochs give 7" in why(row)
    assert "but epoch_seconds is 4.55, its epochs give 1" in why(row)
    (runs[1].folder / "epochs.jsonl").write_text("{}\n")
    assert "epochs.jsonl line 1" in why(row)


def test_why_of_what_failed() -> None:
    run = make_run(0, failure=Failure(kind="OOM", message="CUDA out of memory"))
    text = why(*summarise([Stored(run.record, Path("runs/x.partial"))]))
    assert "seed 0 failed: OOM, CUDA out of memory" in text
