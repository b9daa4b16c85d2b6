"""Searches through Ray Tune: trials that end, are pruned, raise, die and hang; nothing left behind."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from harness.cluster.connect import connect, disconnect
from harness.cluster.job import Failed, Started, Worker
from harness.cluster.search import search

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class TooBigError(Exception):
    """Stands for an error of the train function."""


def toy(spec: dict[str, Any], worker: Worker, report: Any) -> dict[str, Any]:
    """A run that does what its spec says, in every rank."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(worker.rank + 1)])
    last = worker.rank == worker.world_size - 1
    for epoch in range(1, 5):
        if worker.world_size > 1:
            dist.all_reduce(total)
        if spec.get("raises") == epoch and last:
            raise TooBigError("does not fit")
        if spec.get("dies") == epoch and last and not Path(spec["marker"]).exists():
            Path(spec["marker"]).touch()
            time.sleep(0.3)
            os._exit(1)
        report(epoch)
    return {"total": total.item(), "process": os.getpid(), "group": dist.is_initialized()}


@dataclass
class Toys:
    """A study over given specs that stops whom it is told to stop."""

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
                *({"name": f"pruned {n}"} for n in range(2, 5)),
                {"name": "last"},
            ]
        )
        search(toy, study, workers=1, concurrent_runs=2, gpus=0, threads=1, storage=tmp_path / "tune")
        wait_until_free(2)

        pair = Toys(
            [
                {"name": "pruned"},
                {"name": "raises", "raises": 2},
                {"name": "dies", "dies": 2, "marker": str(tmp_path / "peer died")},
            ]
        )
        search(toy, pair, workers=2, concurrent_runs=1, gpus=0, threads=1, storage=tmp_path / "tune")
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

    assert pair.outcomes["pruned"] is None
    assert isinstance(pair.outcomes["raises"], Failed)
    assert pair.outcomes["raises"].exception == "TooBigError", "the cause, not rank 0's broken collective"
    assert pair.outcomes["dies"]["total"] == 24.0, "a peer's death is tried again"
    assert not (tmp_path / "tune").exists()


def test_private_names_of_ray_that_are_used_exist() -> None:
    import inspect

    from ray.train.torch import config
    from ray.tune.search import Searcher

    assert {"world_rank", "world_size", "init_method", "timeout_s"} <= set(
        inspect.signature(config._setup_torch_process_group).parameters
    )
    assert "destroy_process_group" in inspect.signature(config._shutdown_torch).parameters
    assert isinstance(Searcher.FINISHED, str)
