"""--until-ci: seeds are added where the interval is wide, and nowhere else."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import harness
from records import make_result
from scipy import stats

from harness import plan
from harness.results.compare import compare_errors
from harness.results.published import Published
from harness.results.statistics import Estimate, estimate_mean, judge, scatter, squared_spread
from harness.results.store import load_records
from harness.results.values import Record
from harness.spec import RunSpec, UserError
from harness.until_ci import FIRST, Goal, Known, make_goal, more_seeds

WIDTH = plan.Allocation(device="cpu", gpus=0, workers=1, concurrent_runs=1, threads=1)
IMAGES = 10_000


def make_specs(seeds: tuple[int, ...], depths: tuple[int, ...] = (20, 32)) -> list[RunSpec]:
    sweep = plan.Grid(variants=("he2015",), depths=depths, seeds=seeds)
    return plan.expand(sweep, WIDTH, fingerprint="f", train_images=50_000)


def proposed(
    specs: list[RunSpec],
    errors: dict[int, list[float]],
    *,
    half: float = 0.25,
    max_seeds: int = 10,
    gpus: int = 1,
    **known: Any,
) -> list[tuple[int, int]]:
    """(depth, seed) of the next runs; `errors` by depth."""
    rows = {replace(spec, seed=0): Known(tuple(errors[spec.network.depth]), IMAGES, **known) for spec in specs}
    return [(spec.network.depth, spec.seed) for spec in more_seeds(specs, rows, Goal(half, max_seeds), gpus)]


def test_the_interval_is_of_the_moderated_spread_and_wider_by_the_stopping() -> None:
    values = (8.1, 8.25, 8.3, 8.05, 8.2)
    estimate = estimate_mean(values, IMAGES)
    assert estimate is not None
    assert Known(values, IMAGES).half == pytest.approx(stats.t.ppf(0.9825, 12) * estimate.error)
    assert Known().half == math.inf
    wide = estimate_mean((7.0, 8.5, 9.0, 8.0, 7.5), IMAGES)
    assert wide is not None
    assert Known((7.0, 8.5, 9.0, 8.0, 7.5), IMAGES).half == pytest.approx(stats.t.ppf(0.99, 4) * wide.error)


def test_only_wide_rows_get_a_seed() -> None:
    specs = make_specs((0, 1, 2, 3, 4))
    near, far = [8.0, 8.1, 7.9, 8.05, 7.95], [8.0, 9.0, 7.5, 8.5, 8.0]
    assert proposed(specs, {20: near, 32: far}) == [(32, 5)]
    assert proposed(specs, {20: near, 32: near}) == []
    assert proposed(specs, {20: far, 32: far}, max_seeds=5) == []
    assert proposed(specs, {20: far, 32: far}, failed=True) == []


def test_every_row_gets_five_seeds() -> None:
    assert proposed(make_specs((0, 2)), {20: [8.0, 8.0], 32: [8.0, 8.0]}) == [
        (20, 1), (32, 1), (20, 3), (32, 3), (20, 4), (32, 4)
    ]  # fmt: skip


def test_the_smallest_unused_seeds_are_taken_and_idle_gpus_used() -> None:
    specs, far = make_specs((0, 2, 7, 8, 9), depths=(20,)), {20: [6.0, 8.0, 9.0, 10.0, 11.0]}
    assert proposed(specs, far) == [(20, 1)]
    assert proposed(specs, far, gpus=4) == [(20, 1), (20, 3), (20, 4), (20, 5)]
    assert proposed(specs, far, gpus=4, half=0.5, max_seeds=7) == [(20, 1), (20, 3)]


def test_how_many_seeds_it_takes_is_known_beforehand() -> None:
    assert [Goal(half, 99).seeds(8.3, IMAGES) for half in (0.1, 0.15, 0.2, 0.25)] == [39, 19, 11, 8]
    assert Goal(0.1).seeds(8.3, IMAGES) == Goal(0.1).seeds(7.9, IMAGES), "the row's own mean decides nothing"
    refusal = Goal(0.1).refusal(8.3, IMAGES)
    assert (
        refusal == "±0.1 points needs about 39 seeds at an error of 8.3 % on 10,000 images; --max-seeds allows 10"
    )
    assert "about 12 seeds even at an error of 0 % on 360" in (Goal(0.25).refusal(0.0, 360) or ""), "a bound"
    assert Goal(0.1, 40).refusal(8.3, IMAGES) is None
    assert "more than 1,000 seeds" in (Goal(0.001).refusal(8.3, IMAGES) or "")
    assert proposed(make_specs((0,)), {20: [8.3], 32: [0.9]}, half=0.1) == [(32, n) for n in (1, 2, 3, 4)]


def stop(goal: Goal, errors: list[float], images: int = IMAGES, step: int = 1) -> Known:
    """What is known of a row when it gets no further seed."""
    n = FIRST
    while goal.open(known := Known(tuple(errors[:n]), images)):
        n = min(n + step, goal.max_seeds)
    return known


@pytest.mark.parametrize(
    ("half", "limit", "spread", "error", "images", "step"),
    [
        (0.1, 40, 0.2, 8, IMAGES, 1), (0.2, 11, 0.2, 8, IMAGES, 1), (0.2, 14, 0.3, 8, IMAGES, 1), (0.25, 10, 0.3, 8, IMAGES, 1),
        (0.5, 10, 0.6, 8, IMAGES, 1), (0.3, 40, 0.5, 8, IMAGES, 1), (0.3, 20, 0.5, 8, IMAGES, 1), (0.8, 40, 1.5, 8, IMAGES, 1),
        (0.3, 40, 0.5, 8, IMAGES, 4), (1.0, 40, 1.5, 8, 1_000, 1), (2.5, 10, 1.5, 8, 200, 1), (0.11, 40, 0.2, 1, IMAGES, 1),
    ],
)  # fmt: skip
def test_coverage_by_simulation(
    half: float, limit: int, spread: float, error: float, images: int, step: int
) -> None:
    """Of the true mean, in all rows and in those that are said to be known well enough, most of the rows; also where runs scatter by
    twice what the test images explain, which is the worst: 0.26 points at 8 % of 10,000."""
    goal, rows, places = Goal(half, limit), 2_000, 1 if images < 1_000 else 2
    values = np.round(error + spread * np.random.default_rng(0).standard_normal((rows, limit)), places).tolist()
    held = reached = both = 0
    for row in values:
        known = stop(goal, row, images, step)
        hit, narrow = abs(sum(known.errors) / len(known.errors) - error) <= known.half, known.half <= half
        held, reached, both = held + hit, reached + narrow, both + (hit and narrow)
    assert held >= 0.945 * rows
    assert both >= 0.92 * reached
    assert reached > 0.5 * rows


@pytest.mark.parametrize("spread", [0.6, 1.5])
def test_few_rows_are_said_to_be_known_that_scatter_too_much(spread: float) -> None:
    """Those whose spread is small by chance; however it stops, the mean of ten such runs is no better known than it is."""
    goal, rows = Goal(0.25, 10), 2_000
    held = wrong = reached = 0
    for row in np.round(8 + spread * np.random.default_rng(0).standard_normal((rows, 10)), 2).tolist():
        known = stop(goal, row)
        hit, narrow = abs(sum(known.errors) / len(known.errors) - 8) <= known.half, known.half <= goal.half
        held, reached, wrong = held + hit, reached + narrow, wrong + (narrow and not hit)
    assert held >= 0.945 * rows
    assert wrong <= 0.02 * rows
    assert reached <= 0.05 * rows


@pytest.mark.parametrize(("half", "times", "least", "most"), [
    (0.2, 1.0, 0.9, 1.0), (0.3, 1.0, 0.86, 0.95), (0.2, 1.3, 0.58, 0.7), (0.2, 2.0, 0.06, 0.16), (0.12, 2.0, 0.0, 0.06),
])  # fmt: skip
def test_how_often_the_forecast_of_seeds_suffices(half: float, times: float, least: float, most: float) -> None:
    """Where runs scatter so many times what the test images let expect."""
    forecast = Goal(half, 99).seeds(8.0, IMAGES)
    assert forecast is not None
    goal, spread = Goal(half, forecast), times * 100 * math.sqrt(0.08 / (2 * IMAGES))
    rows = np.round(8 + spread * np.random.default_rng(0).standard_normal((1_000, forecast)), 2).tolist()
    assert least <= sum(stop(goal, row).half <= half for row in rows) / 1_000 <= most


@pytest.mark.parametrize(("spread", "together", "half", "limit", "fixed"), [
    (1.0, 0.0, 0.8, 10, 0), (1.0, 0.0, 0.4, 40, 10), (1.0, 0.5, 0.6, 20, 0), (1.0, 0.9, 0.25, 10, 0), (1.0, 0.9, 1.0, 10, 0),
    (0.6, 0.9, 0.5, 10, 0), (0.6, 0.0, 1.0, 10, 0), (0.6, 0.0, 0.5, 40, 0), (0.3, 0.0, 0.25, 10, 0), (0.2, 0.9, 0.2, 11, 0),
])  # fmt: skip
def test_comparisons_of_such_rows_hold_the_difference(
    spread: float, together: float, half: float, limit: int, fixed: int
) -> None:
    """In 90 % and 95 %, whether or not seeds go together on both sides, and beside a row whose seeds were chosen. By the spread of
    all seeds, those that were added for it too, 90 % were 87."""
    draw, goal, repeats = np.random.default_rng(0), Goal(half, limit), 1_000
    common = math.sqrt(together) * draw.standard_normal((repeats, 1, limit))
    own = math.sqrt(1 - together) * draw.standard_normal((repeats, 2, limit))
    held = [0, 0]
    for a, b in np.round(8 + spread * (common + own), 2).tolist():
        both = stop(goal, a).errors, tuple(b[:fixed]) or stop(goal, b).errors
        sides = [
            [
                (Record.model_construct(seed=s, added_until=half if s >= planned else None), e)
                for s, e in enumerate(errors)
            ]
            for errors, planned in zip(both, (FIRST, fixed or FIRST), strict=True)
        ]
        test, _ = compare_errors(sides, IMAGES, scatter(squared_spread(errors, IMAGES) for errors in both))
        assert isinstance(test, Estimate)
        for k, level in enumerate((0.9, 0.95)):
            low, high = test.interval(level)
            held[k] += low <= 0 <= high
    assert held[0] >= 0.885 * repeats
    assert held[1] >= 0.94 * repeats


def test_verdicts_of_such_rows_are_no_more_often_false() -> None:
    """With the spread of the first five: the share of rows called better or worse than one run like theirs, by its p."""
    draw, goal, false = np.random.default_rng(0), Goal(0.2, 11), 0
    for _ in range(600):
        values = np.round(8 + 0.2 * draw.standard_normal(12), 2).tolist()
        published = Published(
            dataset="cifar10", variant="x", depth=20, error=values.pop(), rule="last", recipe="same", source=""
        )
        errors = stop(goal, values).errors
        false += (judge(published, errors, planned=FIRST).p or 0) < 0.05
    assert false <= 0.03 * 600  # 1 % at this spread


MISTAKES: list[tuple[float | None, int | None, str]] = [
    (None, 5, "has no effect without --until-ci"),
    (0.0, None, "above 0"),
    (math.inf, None, "above 0"),
    (math.nan, None, "above 0"),
    (0.1, 4, "at least 5"),
    (0.1, 6, "at least 7"),
]


@pytest.mark.parametrize(("half", "max_seeds", "words"), MISTAKES)
def test_mistakes(half: float | None, max_seeds: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_goal(half, max_seeds, 7 if "7" in words else 3)


def test_the_command_adds_seeds_until_it_is_narrow_or_may_not(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is replaced: depth 8 spreads by a hundredth of a point, depth 14 by nine points."""
    from harness.results.values import RunResult

    def train(spec: RunSpec, worker: Any, report: Any, *, paths: Any) -> RunResult:
        error = 5 + 0.01 * spec.seed if spec.network.depth == 8 else 5 + spec.seed % 2 * 9.0
        return make_result(error, 1.0)

    monkeypatch.setattr("harness.training.train.train", train)
    line = f"run --dataset digits --depths 8,14 --epochs 3 --gpus 0 --launcher local --loader resident --out {tmp_path}"
    code, out, _ = harness(f"{line} --until-ci 2 --max-seeds 6", capsys)
    assert code == 0
    assert (
        "he2015-8: ±2 points will take about 5 seeds at an error of 1 %, 5 seeds at an error of 5 %, 5 seeds at an error of 10 %"
        in out
    )
    assert "more where runs scatter by more than these explain" in " ".join(out.split())
    seeds: dict[int, list[int]] = {8: [], 14: []}
    for stored in load_records([tmp_path]).records:
        seeds[stored.record.depth].append(stored.record.seed)
        assert stored.record.added_until == (2.0 if stored.record.seed >= 5 else None)
    assert seeds == {8: [0, 1, 2, 3, 4], 14: [0, 1, 2, 3, 4, 5]}
    assert "he2015-14: after 6 seeds its error is known to ±" in out
    assert "he2015-8: after" not in out
    assert re.search(r"he2015-8: its error is known to ±[01]\.\d\d points after 5 seeds \(--until-ci 2\)", out)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert "report.html" in out
    code, out, _ = harness(f"{line} --until-ci 2 --max-seeds 6", capsys)
    assert (code, "all 11 runs were done already" in out) == (0, True)
    code, out, _ = harness(f"{line} --until-ci 2 --dry-run", capsys)
    assert "up to 10 per row" in out
    code, _, _ = harness(f"{line} --until-ci 0.1", capsys)
    assert code == 2


def test_the_error_that_the_report_compares_is_watched(tmp_path: Path) -> None:
    """Of the test set, where images were held out; of the runs in the latest row alone."""
    from test_store import make_record, make_stored_result

    from harness.record import Recorder
    from harness.results.store import finish
    from harness.spec import RunPaths
    from harness.until_ci import known_errors

    specs = make_specs((0, 1, 2), depths=(20,))
    recorder = Recorder(RunPaths(out=tmp_path, label="cifar10"), True, {}, print)
    for spec, torch in zip(specs, ("2.11.0", "2.15.0", "2.15.0"), strict=True):
        result = make_stored_result(
            evaluated_on="val", final_error=40.0, test_error=8.0 + spec.seed, test_images=IMAGES
        )
        record = make_record(spec.seed, key=spec.key, name=recorder.paths.name(spec),
                             spec=spec.to_json(), result=result, dataset="cifar10",
                             environment={"versions": {"torch": torch}})  # fmt: skip
        finish(
            tmp_path, record.model_copy(update={"finished_at": record.finished_at.replace(minute=10 + spec.seed)})
        )
    assert known_errors(recorder, specs) == {replace(specs[0], seed=0): Known((9.0, 10.0), IMAGES)}
