"""--until-ci: seeds are added where the interval is wide, and nowhere else."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from harness import cli, plan
from harness.results.store import load_records
from harness.spec import RunSpec, UserError

WIDTH = plan.Allocation(device="cpu", gpus=0, workers=1, concurrent_runs=1, threads=1)


def make_specs(seeds: tuple[int, ...], depths: tuple[int, ...] = (20, 32)) -> list[RunSpec]:
    sweep = plan.Grid(variants=("he2015",), depths=depths, seeds=seeds)
    return plan.expand(sweep, WIDTH, fingerprint="f", train_images=50_000)


def asked(
    specs: list[RunSpec], errors: dict[str, float], *, concurrent_runs: int = 1, max_seeds: int = 10
) -> list[tuple[int, int]]:
    more = plan.more_seeds(specs, errors, until_ci=0.1, max_seeds=max_seeds, concurrent_runs=concurrent_runs)
    return [(spec.network.depth, spec.seed) for spec in more]


def test_half_widths_are_students(capsys: Any) -> None:
    specs = make_specs((0, 1, 2, 5), depths=(20,))
    values = [8.1, 8.25, 8.3, 8.05]
    errors = {spec.key: value for spec, value in zip(specs, values, strict=True)}
    (half,) = plan.error_half_widths(specs, errors).values()
    low, high = stats.t.interval(0.95, 3, loc=stats.tmean(values), scale=stats.sem(values))
    assert half == pytest.approx((high - low) / 2)


def test_only_wide_rows_get_a_seed() -> None:
    specs = make_specs((0, 1))
    errors = {s.key: 8.0 + (0.001 if s.network.depth == 20 else 0.5) * s.seed for s in specs}
    assert asked(specs, errors) == [(32, 2)]
    assert asked(specs, dict.fromkeys(errors, 8.0)) == []


def test_one_run_has_no_interval_and_gets_a_second() -> None:
    specs = make_specs((0,))
    assert asked(specs, {s.key: 8.0 for s in specs}) == [(20, 1), (32, 1)]


def test_the_smallest_unused_seeds_are_taken_and_idle_gpus_used() -> None:
    specs = make_specs((0, 2, 7), depths=(20,))
    errors = {s.key: 8.0 + s.seed for s in specs}
    assert asked(specs, errors) == [(20, 1)]
    assert asked(specs, errors, concurrent_runs=4) == [(20, 1), (20, 3), (20, 4), (20, 5)]
    assert asked(specs, errors, concurrent_runs=4, max_seeds=5) == [(20, 1), (20, 3)]
    assert asked(specs, errors, max_seeds=3) == []


@pytest.mark.parametrize("wrong", [math.nan, None])
def test_a_row_with_a_failed_or_diverged_run_gets_no_more(wrong: float | None) -> None:
    specs = make_specs((0, 1))
    errors = {s.key: 8.0 + s.seed for s in specs}
    del errors[specs[0].key]
    if wrong is not None:
        errors[specs[0].key] = wrong
    assert asked(specs, errors) == [(32, 2)]


MISTAKES: list[tuple[float | None, int | None, str]] = [
    (None, 5, "is for --until-ci"),
    (0.0, None, "above 0"),
    (math.inf, None, "above 0"),
    (math.nan, None, "above 0"),
    (0.1, 2, "at least 3"),
]


@pytest.mark.parametrize(("until_ci", "max_seeds", "words"), MISTAKES)
def test_mistakes(until_ci: float | None, max_seeds: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan.check_until_ci(plan.Grid(variants=("he2015",), seeds=(0, 1, 2)), until_ci, max_seeds)


def run(line: str, capsys: Any) -> tuple[int, str]:
    before = sys.argv
    sys.argv = ["harness", "run", *shlex.split(line)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    return int(stop.value.code or 0), capsys.readouterr().out


def test_the_command_adds_seeds_until_it_is_narrow_or_may_not(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is replaced: depth 8 spreads by a hundredth of a point, depth 14 by whole points."""
    import harness.training.train
    from harness.results.values import Measurement, Memory, RunResult

    def train(spec: RunSpec, worker: Any, report: Any, *, paths: Any) -> RunResult:
        none = Measurement(value=None, reason="stub")
        error = 5 + spec.seed * (0.01 if spec.network.depth == 8 else 1.0)
        return RunResult(
            parameters=1, evaluated_on="test", final_error=error, best_error=error, best_epoch=1, epoch_seconds=1.0,
            warmup_epochs=0, eval_seconds=0.1, images_per_second=1.0, setup_seconds=0.1, train_seconds=1.0, workers=1,
            memory=Memory(torch_allocated_mib=none, torch_reserved_mib=none, nvml_process_mib=none, rss_mib=none),
            batch_size=128, batch_size_per_gpu=128, threads=1, device="stub",
        )  # fmt: skip

    monkeypatch.setattr(harness.training.train, "train", train)
    line = (
        f"--dataset digits --depths 8,14 --epochs 3 --gpus 0 --launcher local --loader resident --out {tmp_path}"
    )
    code, out = run(f"{line} --until-ci 0.1 --max-seeds 4", capsys)
    assert code == 0
    seeds: dict[int, list[int]] = {8: [], 14: []}
    for stored in load_records([tmp_path]).records:
        seeds[stored.record.depth].append(stored.record.seed)
    assert seeds == {8: [0, 1], 14: [0, 1, 2, 3]}  # two seeds give ±0.064
    assert "he2015-14: after 4 seeds its error is known to ±2.05 points, not to ±0.1" in out
    assert "he2015-8: after" not in out
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert "report.html" in out
    code, out = run(f"{line} --until-ci 0.1 --max-seeds 4", capsys)
    assert (code, "all 6 runs were done already" in out) == (0, True)
    code, out = run(f"{line} --until-ci 0.1 --max-seeds 5", capsys)
    assert (code, "seed 4" in out, "seed 3: starting" in out) == (0, True, False)
    code, out = run(f"{line} --until-ci 0.1 --dry-run", capsys)
    assert "to 10 of a row" in out
