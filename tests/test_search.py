"""Searches through Ray Tune: trials that end, are pruned, raise, die and hang; nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

import harness.cluster.search as cluster_search
from harness.cluster.connect import ClusterError, connect, disconnect
from harness.cluster.job import Allocation, Failed, PreemptedError, Started, Worker
from harness.cluster.search import _Driver, leave, run_rank, search

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class TooBigError(Exception):
    """Stands for an error of the train function."""


class Held:
    """Stands for a CUDA graph of the train function: notes whether the process group still stood when it was freed."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __del__(self) -> None:
        import torch.distributed as dist

        self.log.write_text(f"freed {'before' if dist.is_initialized() else 'after'} the group was destroyed\n")


def note_teardown(folder: Path, rank: int) -> Held:
    """Let this process note its teardown in <folder>/<rank>."""
    import torch.distributed as dist

    log, destroy = folder / f"{rank}", dist.destroy_process_group

    def destroy_and_note(*args: Any, **options: Any) -> None:
        destroy(*args, **options)
        with log.open("a") as file:
            file.write("destroyed\n")

    dist.destroy_process_group = destroy_and_note
    return Held(log)


def return_late(seconds: float) -> None:
    """Let this process take so long from its outcome to its return."""
    from harness.cluster import search

    report = search.tune.report

    def report_and_wait(event: dict[str, Any]) -> None:
        report(event)
        time.sleep(seconds * ("outcome" in event))

    search.tune.report = report_and_wait


def toy(spec: dict[str, Any], worker: Worker, report: Any) -> dict[str, Any]:
    """A run that does what its spec says, in every rank."""
    import torch
    import torch.distributed as dist

    from harness.cluster.workers import gather

    held = note_teardown(Path(spec["teardown"]), worker.rank) if "teardown" in spec else None
    if "returns_after" in spec:
        return_late(spec["returns_after"])
    total = torch.tensor([float(worker.rank + 1)])
    last = worker.rank == worker.world_size - 1
    for epoch in range(1, 5):
        if worker.world_size > 1:
            dist.all_reduce(total)
        if spec.get("raises") == epoch and last:
            raise TooBigError("does not fit")
        if spec.get("leaves", 0) > len(marks := list(Path(spec.get("marks", "/nowhere")).glob("*"))):
            gather(None)
            if last:
                Path(spec["marks"], f"{len(marks)}").touch()
                os.kill(os.getpid(), signal.SIGTERM)
            assert worker.notice is not None
            while not any(gather(worker.notice() is not None)):
                time.sleep(0.1)
            raise PreemptedError("stopped before step 5 of epoch 2")
        if spec.get("dies") == epoch and last and not Path(spec["marker"]).exists():
            Path(spec["marker"]).touch()
            time.sleep(0.3)
            os._exit(1)
        try:
            report(epoch)
        except SystemExit:
            time.sleep(spec.get("lingers", 0))
            raise
    assert held is None or held.log
    return {"total": total.item(), "process": os.getpid(), "group": dist.is_initialized()}


@dataclass
class Toys:
    """Given specs; those named so are pruned."""

    specs: list[dict[str, Any]]
    events: list[tuple[str, Any]] = field(default_factory=list)
    outcomes: dict[str, Any] = field(default_factory=dict)

    def propose(self) -> tuple[str, dict[str, Any]] | None:
        if not self.specs:
            return None
        spec = self.specs.pop(0)
        return spec["name"], spec

    def reported(self, name: str, event: Any) -> bool:
        self.events.append((name, event))
        return name.startswith("pruned") and event == 2

    def ended(self, name: str, outcome: Any) -> None:
        assert name not in self.outcomes
        self.outcomes[name] = outcome


def make_job(storage: Path, world_size: int) -> Allocation:
    return Allocation(
        workers=world_size, concurrent_runs=2 // world_size, device="cpu", threads=1, storage=storage
    )


def wait_until_free(cpus: int) -> float:
    import ray

    began = time.monotonic()
    while ray.available_resources().get("CPU", 0) < cpus:
        assert time.monotonic() - began < 20, ray.available_resources()
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.ray
def test_trials_end_stop_raise_and_die_and_every_cpu_is_free_afterwards(tmp_path: Path) -> None:
    connect(None, cpus=2, gpus=0)
    try:
        study = Toys(
            [
                {"name": "good"},
                {"name": "pruned 1"},
                {"name": "raises", "raises": 2},
                {"name": "dies", "dies": 3, "marker": str(tmp_path / "died")},
                *({"name": f"pruned {n}", "lingers": 3} for n in range(2, 5)),
                {"name": "leaves", "leaves": 3, "marks": str(tmp_path / "one")},
                {"name": "last"},
            ]
        )
        for name in ("one", "pair"):
            (tmp_path / name).mkdir()
        search(toy, study, make_job(tmp_path / "tune", 1))
        wait_until_free(2)

        for name in ("pruned", "raises", "ends"):
            (tmp_path / name).mkdir()
        pair = Toys(
            [
                {"name": "pruned", "teardown": str(tmp_path / "pruned")},
                {"name": "raises", "raises": 2, "teardown": str(tmp_path / "raises")},
                {"name": "ends", "teardown": str(tmp_path / "ends")},
                {"name": "dies", "dies": 2, "marker": str(tmp_path / "peer died")},
                {"name": "leaves", "leaves": 1, "marks": str(tmp_path / "pair")},
            ]
        )
        search(toy, pair, make_job(tmp_path / "tune", 2))
        wait_until_free(2)
    finally:
        disconnect()
    assert study.outcomes["good"]["total"] == 1.0
    assert study.outcomes["last"]["process"]
    assert [study.outcomes[f"pruned {n}"] for n in range(1, 5)] == [None] * 4
    assert ("pruned 1", 3) not in study.events
    failed = study.outcomes["raises"]
    assert isinstance(failed, Failed)
    assert (failed.exception, failed.message) == ("TooBigError", "does not fit")
    assert [e for n, e in study.events if n == "raises"] == [Started(attempt=1), 1], "no retry"
    attempts = [e.attempt for n, e in study.events if n == "dies" and isinstance(e, Started)]
    assert attempts == [1, 2]
    assert study.outcomes["dies"]["total"] == 1.0
    left = [e for n, e in study.events if n == "leaves" and isinstance(e, Started)]
    reasons = [""] + ["a worker had to leave: stopped before step 5 of epoch 2"] * 3
    assert [(e.attempt, e.reason) for e in left] == list(enumerate(reasons, 1)), "it is no failure"
    assert study.outcomes["leaves"]["total"] == 1.0

    assert pair.outcomes["pruned"] is None
    assert isinstance(pair.outcomes["raises"], Failed)
    assert pair.outcomes["raises"].exception == "TooBigError", "the cause, not rank 0's broken collective"
    assert pair.outcomes["dies"]["total"] == 24.0, "a peer's death is tried again"
    assert pair.outcomes["leaves"]["total"] == 24.0, "so is a peer that has to leave"
    for name in ("pruned", "raises", "ends"):
        for rank in ("0", "1"):
            lines = (tmp_path / name / rank).read_text().splitlines()
            # rank 0's process serves several trials, and each adds its note
            assert lines[0] == "freed before the group was destroyed", (name, rank)
            assert set(lines[1:]) == {"destroyed"}, (name, rank)
    assert not (tmp_path / "tune").exists()


@pytest.mark.ray
def test_one_process_serves_all_trials_though_there_is_room_for_others(tmp_path: Path) -> None:
    connect(None, cpus=3, gpus=0)
    try:
        toys = Toys([{"name": "first", "returns_after": 8}, {"name": "pruned", "lingers": 1}, {"name": "last"}])
        search(toy, toys, replace(make_job(tmp_path / "tune", 1), concurrent_runs=1))
    finally:
        disconnect()
    assert toys.outcomes["pruned"] is None
    assert toys.outcomes["first"]["process"] == toys.outcomes["last"]["process"]


def test_private_names_of_ray_that_are_used_exist() -> None:
    import inspect

    from ray.train.torch import config
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial
    from ray.tune.search import Searcher

    assert {"world_rank", "world_size", "init_method", "timeout_s"} <= set(
        inspect.signature(config._setup_torch_process_group).parameters
    )
    assert "destroy_process_group" in inspect.signature(config._shutdown_torch).parameters
    assert isinstance(Searcher.FINISHED, str)
    trial = Trial("unknown", stub=True, max_failures=1)
    trial.run_metadata.num_failures = 1
    assert trial.should_recover()
    trial.max_failures = 0
    assert not trial.should_recover()
    assert list(inspect.signature(trial.handle_error).parameters) == ["exc"]
    assert "trial.handle_error(exception)" in inspect.getsource(TuneController)


def test_a_failed_rank_frees_what_its_frames_hold_before_it_leaves(tmp_path: Path) -> None:
    order: list[str] = []
    elsewhere: list[BaseException] = []  # a log's handler, say: what it holds must hold no graph

    class Graph:
        def __del__(self) -> None:
            order.append("freed")

    def fails(spec: Any, worker: Worker, report: Any) -> None:
        held = Graph()
        try:
            raise KeyError(str(held)[:0])
        except KeyError as error:
            elsewhere.append(error)
            raise TooBigError("does not fit") from error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.torch.config._shutdown_torch", lambda **_: order.append("left"))
        outcome, left = run_rank(fails, None, Worker(), lambda _: None, "")
    assert isinstance(outcome, Failed)
    assert outcome.exception == "TooBigError"
    assert left
    assert order == ["freed", "left"]


def test_a_group_that_cannot_be_destroyed_is_given_up_at_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.train.torch.config._shutdown_torch", lambda **_: time.sleep(30))
    began = time.monotonic()
    assert not leave(0.2)
    assert time.monotonic() - began < 5
    monkeypatch.setattr("ray.train.torch.config._shutdown_torch", lambda **_: None)
    assert leave(5)


def test_while_nothing_trains_it_is_said_why_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, lacking, nodes, said = [0.0], ["1 GPU is free, 2 are wanted"], [["a node"]], list[Any]()
    monkeypatch.setattr(cluster_search, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(cluster_search, "find_lacking", lambda *_: lacking[0])
    monkeypatch.setattr(cluster_search, "inspect_cluster", lambda: nodes[0])
    trials: Any = SimpleNamespace(waiting=lambda seconds, reason: said.append((seconds, reason)))
    driver = _Driver(trials, replace(make_job(tmp_path, 1), placement_timeout_seconds=60))
    one = SimpleNamespace(status="PENDING")

    def step(at: float) -> None:
        now[0] = at
        driver.on_step_begin(0, [one])

    step(500)  # no trial yet: nothing waits
    driver.running["1"] = "1"
    for second in range(501, 531):
        step(second)
    assert said == [(seconds, lacking[0]) for seconds in (10, 20, 30)]
    one.status = "RUNNING"
    step(531)
    one.status, lacking[0] = "PENDING", ""
    step(541)
    assert said[-1] == (10, "processes are starting")
    lacking[0] = "no GPU is free"
    with pytest.raises(ClusterError, match=r"^no room in the cluster within 1 minutes \(no GPU is free\)$"):
        step(593)
    nodes[0] = []
    driver.raised.clear()
    with pytest.raises(ClusterError, match="none of its nodes answers"):
        step(610)
    assert driver.raised, "Tune raises its own error instead"


def test_a_trial_that_tune_forgets_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen once, on a machine with ten times as much to do as it can: Tune ended, and one trial had come to nothing."""

    def forget(*_: Any, search_alg: Any, stop: Any, **__: Any) -> None:
        search_alg.suggest("1")
        search_alg.suggest("2")
        stop("1", {"outcome": ("a result",)})

    monkeypatch.setattr("harness.cluster.search.tune.run", forget)
    toys = Toys([{"name": "kept"}, {"name": "forgotten"}])
    search(toy, toys, make_job(tmp_path, 1))
    assert toys.outcomes["kept"] == "a result"
    assert toys.outcomes["forgotten"].message == "Ray Tune ended without its outcome"
