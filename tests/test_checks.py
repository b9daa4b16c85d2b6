"""What `harness check` measures: all of it passes here, and each check sees the fault that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tape import Tape

from harness.cluster.job import Worker
from harness.training import checks, setup

ALONE = Worker(threads=1)


@pytest.fixture(scope="module")
def eager() -> list[float]:
    return [row.loss for row in checks.train(ALONE)[0]]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Worker]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield ALONE
    dist.destroy_process_group()


@pytest.mark.parametrize("name", checks.LOADERS)
def test_a_loader_that_swaps_labels_or_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_loader(ALONE, name, {}).passed
    make = checks.make_loaders

    def faulty(change: Any) -> Any:
        def made(*args: Any) -> Any:
            loader, other = make(*args)

            def epoch(number: int) -> Any:
                return (change(*batch) for batch in loader.epoch(number))

            return SimpleNamespace(epoch=epoch, steps=loader.steps, close=loader.close), other

        return made

    for change in (lambda i, n: (i, n.roll(1)), lambda i, n: (i.flip(3), n), lambda i, n: (i.roll(1, 0), n)):
        monkeypatch.setattr(checks, "make_loaders", faulty(change))
        assert checks.check_loader(ALONE, name, {}).passed is False


def test_a_graph_that_freezes_the_lr_and_one_that_does_not_come_about(
    eager: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped = checks.check_engine(ALONE, "graph", eager, {})
    assert (skipped.passed, "cannot capture" in skipped.detail) == (None, True)
    monkeypatch.setattr(setup, "make_graphs", lambda _: Tape)
    assert checks.check_engine(ALONE, "graph", eager, {}).passed
    with monkeypatch.context() as patch:
        patch.setattr("harness.training.train.set_lr", lambda *_: None)
        assert checks.check_engine(ALONE, "graph", eager, {}).passed is False
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "capture", lambda _: 1 / 0)
        failed = checks.attempt("graph", lambda: checks.check_engine(ALONE, "graph", eager, {}))
        assert (failed.passed, "going on with eager" in failed.detail) == (False, True)


def test_a_precision_that_is_wrong_or_not_there(eager: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_precision(ALONE, "bf16", eager).passed
    assert checks.check_precision(ALONE, "fp16", eager).passed is None
    assert checks.check_precision(ALONE, "bf16", [loss * 1.3 for loss in eager]).passed is False
    monkeypatch.setattr("harness.training.step.make_autocast", lambda *_: torch.autocast("cpu", enabled=False))
    assert checks.check_precision(ALONE, "bf16", eager).passed is False


def test_a_resume_that_drops_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_resume(ALONE).passed
    monkeypatch.setattr("harness.training.train.load_optimizer_state", lambda *_: None)
    assert checks.check_resume(ALONE).passed is False


def test_memory_that_belongs_to_nobody() -> None:
    assert checks.judge_memory({"weights": 99.0, "unaccounted": 1.0}, on_gpu=True).passed
    assert checks.judge_memory({"weights": 90.0, "unaccounted": 10.0}, on_gpu=True).passed is False
    assert checks.judge_memory({"weights": 110.0, "unaccounted": -10.0}, on_gpu=True).passed is False
    assert checks.check_memory(ALONE).passed is None


def test_a_clock_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_clock(ALONE).passed
    real = checks.time
    fake = SimpleNamespace(
        perf_counter=lambda: real.perf_counter() * 1.05, clock_gettime=real.clock_gettime,
        CLOCK_MONOTONIC_RAW=real.CLOCK_MONOTONIC_RAW,
    )  # fmt: skip
    monkeypatch.setattr(checks, "time", fake)
    assert checks.check_clock(ALONE).passed is False


def test_a_group_that_does_not_sum_or_does_not_end(group: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    results = checks.run_rank_checks(checks.make_spec(group), group, lambda _: None)
    assert [result.passed for result in results] == [True, True, True]
    monkeypatch.setattr(checks, "GROUP_SECONDS", 0.0)
    assert checks.check_group(group).passed is False
    assert checks.check_sum(replace(group, world_size=2)).passed is False, "two ranks, of which one is summed"


def test_a_rank_that_does_not_sum(group: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "sum_gradients", lambda parameters, _: parameters[0].grad.zero_())
    assert checks.check_sum(group).passed is False
    whole, calls = checks.train, []

    def one_trains_less(worker: Worker, **changes: Any) -> Any:
        metrics, weights = whole(worker, **changes)
        calls.append(worker)
        return (
            metrics if len(calls) == 1 else [m.model_copy(update={"loss": m.loss * 1.01}) for m in metrics]
        ), weights

    monkeypatch.setattr(checks, "train", one_trains_less)
    assert checks.check_ranks(group).passed is False


def test_a_check_that_breaks_has_failed_and_a_missing_package_is_skipped() -> None:
    def raises(error: Exception) -> Any:
        def check() -> checks.Check:
            raise error

        return check

    assert checks.attempt("x", raises(RuntimeError("a\nb"))) == checks.Check("x", False, "a")
    assert checks.attempt("x", raises(ImportError("nvidia.dali"))).passed is None
