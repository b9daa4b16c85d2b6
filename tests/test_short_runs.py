"""The seeds of a row, one after another in the same workers: as fresh processes would have them, failures included."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command import harness
from ray import cloudpickle
from safetensors.torch import load_file

from harness.cluster.connect import connect, disconnect
from harness.cluster.job import Allocation, Ended, Entered, Failed, Started, Worker
from harness.cluster.launch import launch
from harness.cluster.workers import Mailbox
from harness.results.store import WEIGHTS, load_epochs, load_records

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def place(spec: dict[str, Any], worker: Worker, report: Any) -> int:
    """Where a run is carried out."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.zeros(1))
    report(worker.rank)
    if spec.get("dies") and worker.attempt == 1 and worker.rank == 1:
        time.sleep(0.5)
        os._exit(1)
    if spec.get("raises"):
        raise ValueError("as always")
    dist.barrier()
    return os.getpid() if worker.attempt == 1 + spec.get("dies", 0) else -1


@pytest.mark.long
@pytest.mark.ray
def test_seeds_of_a_row_share_workers_and_a_failure_ends_them(tmp_path: Path) -> None:
    specs = [
        {"name": "a0", "row": "a"}, {"name": "b0", "row": "b"}, {"name": "a1", "row": "a", "dies": 1},
        {"name": "b1", "row": "b", "raises": True}, {"name": "a2", "row": "a"}, {"name": "b2", "row": "b"},
    ]  # fmt: skip
    job = Allocation(workers=2, concurrent_runs=1, device="cpu", threads=1, storage=tmp_path / "ray", retries=1)
    events: list[tuple[str, Any]] = []
    outcomes: dict[str, Any] = {}
    connect(None, cpus=2, gpus=0)
    try:
        for spec, outcome in launch(
            place, specs, job, progress=lambda s, e: events.append((s["name"], e)), row=lambda spec: spec["row"]
        ):
            outcomes[spec["name"]] = outcome
            events.append((spec["name"], "over"))
    finally:
        disconnect()
    assert list(outcomes) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert isinstance(outcomes["b1"], Failed)
    assert outcomes["b1"].message == "as always"
    pids = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, int)}
    assert pids["a1"] == pids["a2"] != pids["a0"], "the death ended the workers, the next attempt's went on"
    assert pids["b0"] != pids["b2"], "so did the exception"
    assert len(set(pids.values())) == 4
    of_a1 = [e for name, e in events if name == "a1"]
    assert [e.attempt for e in of_a1 if isinstance(e, Started)] == [1, 2]
    assert "died" in next(e.reason for e in of_a1 if isinstance(e, Started) and e.attempt == 2)
    for name in outcomes:
        own = [e for other, e in events if other == name]
        assert own[0] == Started(attempt=1), name
        assert own[-1] == "over"
        assert own.count(Entered()) == sum(isinstance(e, Started) for e in own)
    order = [name for name, e in events if e == "over" or e == Started(attempt=1)]
    assert order == [name for name in outcomes for _ in range(2)], "each begins when the one before it is stored"


def test_between_two_runs_workers_and_driver_agree_on_what_comes_next() -> None:
    mailbox = Mailbox()
    mailbox.put(0, Ended(outcome=None, more=True))
    assert mailbox.read(("next", 0)) is None
    assert mailbox.follow(0, (3, "spec"))
    assert mailbox.read(("next", 0)) == ((3, "spec"),)
    assert mailbox.close(0) == 3, "they died in run 3"
    mailbox.put(3, Ended(outcome=None, more=True))
    assert mailbox.close(0) is None
    assert not mailbox.follow(3, (4, "spec")), "they died after it: others must begin run 4"
    mailbox.put(5, Ended(outcome=None, more=True))
    mailbox.follow(5, None)
    assert mailbox.read(("next", 5)) == (None,)


RUN = (
    "run --dataset digits --depths 8 --limit-train 256 --epochs 3 --gpus 0 --workers 2 --loader resident "
    "--launcher ray --seeds"
)


@pytest.mark.long
@pytest.mark.ray
def test_a_run_in_kept_workers_is_that_of_a_fresh_process(tmp_path: Path, capsys: Any) -> None:
    """Weights and losses bit for bit; memory as far as fresh processes differ among themselves, which is up to 12 % (many of
    them are compared by benchmarks/kept_workers.py)."""
    seen: list[Any] = []
    for seeds in ("2", "1..1"):
        code, _, err = harness(f"{RUN} {seeds} --out {tmp_path / seeds}", capsys)
        assert code == 0, err
        runs = {stored.record.seed: stored for stored in load_records([tmp_path / seeds]).records}
        seen.append((runs[1].record.result, load_epochs(runs[1].folder), load_file(runs[1].folder / WEIGHTS)))
    (kept, kept_epochs, kept_weights), (fresh, fresh_epochs, fresh_weights) = seen
    assert kept.launch_seconds < fresh.launch_seconds / 2
    for a, b in zip(kept_epochs, fresh_epochs, strict=True):
        assert (a.loss, a.train_error, a.error) == (b.loss, b.train_error, b.error)
    assert kept_weights.keys() == fresh_weights.keys()
    assert all(torch.equal(kept_weights[name], fresh_weights[name]) for name in kept_weights)
    assert kept.memory.rss_mib.value == pytest.approx(fresh.memory.rss_mib.value, rel=0.15)
