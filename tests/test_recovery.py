"""What a run survives, and that its numbers are then those of a run that nothing happened to."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import two_nodes
from processes import run_ranks
from ray import cloudpickle

from harness.cluster.connect import connect, disconnect
from harness.cluster.job import (
    Allocation,
    Entered,
    Failed,
    Started,
    Telemetry,
    Waiting,
    Worker,
    is_of_device,
    make_failed,
)
from harness.cluster.launch import _Driver, _Run, launch
from harness.cluster.nodes import Cluster, Node, Unanswered, ask_every_node, choose_world_size, fit
from harness.cluster.workers import Task
from harness.loaders import dali
from harness.record import classify
from harness.results.store import load_epochs, load_records
from harness.results.values import EpochMetrics
from harness.training.watchdog import RankStalledError

ROOT = Path(__file__).resolve().parent.parent
# An idle machine of two cores takes about 7 and 12 seconds: these are for a busy one, and below the minute for which
# Ray Train waits by itself, torch's five and its own thirty for a peer that is gone
NOTICED_SECONDS, RECOVERED_SECONDS = 60, 120

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def load_chaos() -> Any:
    spec = spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    assert spec is not None
    assert spec.loader is not None
    chaos = module_from_spec(spec)
    sys.modules["chaos"] = chaos
    sys.path.insert(0, str(ROOT / "benchmarks"))  # chaos.py imports its neighbours
    try:
        spec.loader.exec_module(chaos)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return chaos


def train_plainly(out: Path, workers: int, last: int = two_nodes.EPOCHS) -> None:
    """Train or go on without Ray in so many processes, to epoch `last`."""
    rendezvous = str(out.with_name(f"{out.name}-{workers}-{last}"))
    if workers == 1:
        two_nodes.train_plainly(0, 1, rendezvous, str(out), last)
    else:
        run_ranks(two_nodes.train_plainly, workers, rendezvous, str(out), last, ranks=workers)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[EpochMetrics]:
    """The run of two_nodes.py by two plain processes to which nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed") / "runs"
    train_plainly(out, 2)
    (partial,) = out.glob("*.partial")
    return load_epochs(partial)


def disturb(out: Path, *words: str) -> dict[str, Any]:
    """What two_nodes.py printed."""
    script = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "two_nodes.py"), str(out), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=560,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr[-2000:]
    answer: dict[str, Any] = json.loads(script.stdout.splitlines()[-1])
    assert answer["code"] == 0, "\n".join(answer["lines"])
    return answer


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(600)  # the suite's 300 are little on a busy machine
def test_a_lost_node_costs_time_and_nothing_else(tmp_path: Path, undisturbed: list[EpochMetrics]) -> None:
    """Two raylets, DDP over both, one killed in mid-run, another brought: every loss is as without."""
    out = tmp_path / "runs"
    answer = disturb(out)
    text = "\n".join(answer["lines"])
    assert "waiting for room" in text
    assert "2 CPU wanted, 1 free" in text
    assert "died (killed, or its node was lost); trying again (2)" in text
    assert answer["waited_seconds"] < NOTICED_SECONDS, "from the kill until the run was seen to wait"
    assert answer["recovery_seconds"] < RECOVERED_SECONDS, "from the new node until an epoch"
    (stored,) = load_records([out]).records
    assert stored.record.result.attempts == 2
    assert [rank.rank for rank in stored.record.result.ranks] == [0, 1]
    assert len(stored.record.result.nodes) == 2, "each node was watched"
    assert all(node.gpus_reason == "no GPU was used" for node in stored.record.result.nodes)
    first, second = stored.record.environment["attempts"]
    assert (first["reason"], "died" in second["reason"]) == ("", True)
    epochs = load_epochs(stored.folder)
    assert all(row.skew is not None and row.skew >= 1 and row.slowest_rank in (0, 1) for row in epochs)
    assert [(row.loss, row.error) for row in epochs] == [(row.loss, row.error) for row in undisturbed]
    attempts = [row.attempt for row in epochs]
    assert attempts[:3] == [1, 1, 1], "what was trained before is not trained again"
    assert attempts[-1] == 2
    assert {row.images for row in epochs} == {two_nodes.IMAGES}


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_elastic_run_goes_on_with_fewer_workers_and_grows_again(
    tmp_path: Path, undisturbed: list[EpochMetrics]
) -> None:
    """Two raylets, one killed, no other in its place: one worker goes on. A node comes: two again.

    A rank's batch norm sees its share of a batch, so the losses at another width are others: they are compared, bit
    for bit, with those of plain processes whose number changes after the same epochs; and the last loss, roughly, with a run of two.
    """
    out, plain = tmp_path / "runs", tmp_path / "plain"
    answer = disturb(out, "elastic")
    text = "\n".join(answer["lines"])
    assert "died (killed, or its node was lost); trying again (2) with 1 of 2 workers" in text
    assert re.search(r"room for more workers: stopped before epoch \d+; trying again \(3\)", text)
    assert answer["waited_seconds"] < NOTICED_SECONDS, "from the kill until it went on narrower"
    assert answer["recovery_seconds"] < RECOVERED_SECONDS, "from then until an epoch"
    assert "world size 2→1→2: the cluster had no room for 2 workers" in text
    (stored,) = load_records([out]).records
    result = stored.record.result
    assert (result.workers, result.widths, result.attempts) == (2, (2, 1, 2), 3)
    assert [rank.rank for rank in result.ranks] == [0, 1]
    assert len(result.nodes) == 2, "each node was watched"
    attempts = stored.record.environment["attempts"]
    assert [attempt.get("workers") for attempt in attempts] == [None, 1, None]
    assert ["died" in attempt["reason"] for attempt in attempts] == [False, True, False]
    epochs = load_epochs(stored.folder)
    assert [row.attempt for row in epochs[:3]] == [1, 1, 1], "what was trained before is not trained again"
    assert all(row.skew >= 1 and row.slowest_rank in (0, 1) for row in epochs if row.workers != 1)
    assert {row.timed for row in epochs if row.workers == 1} == {False}, "another width is another measurement"
    assert {row.images for row in epochs} == {two_nodes.IMAGES}

    narrow = [row.epoch for row in epochs if row.workers == 1]
    train_plainly(plain, 2, narrow[0] - 1)
    train_plainly(plain, 1, narrow[-1])
    train_plainly(plain, 2)
    (partial,) = plain.glob("*.partial")
    assert [(row.loss, row.error) for row in epochs] == [(row.loss, row.error) for row in load_epochs(partial)]
    assert [row.loss for row in epochs[: narrow[0] - 1]] == [row.loss for row in undisturbed[: narrow[0] - 1]]
    assert [row.lr for row in epochs] == [row.lr for row in undisturbed]
    assert abs(epochs[-1].loss - undisturbed[-1].loss) < 0.3


@pytest.mark.parametrize(
    ("alive", "placement", "expected"),
    [
        (((8, 4), (8, 4)), "pack", 8),
        (((8, 4),), "pack", 4),
        (((8, 4), (2, 1)), "pack", 4),  # five would fit, and divide no batch
        (((8, 4), (8, 4)), "strict-pack", 4),
        (((8, 4), (2, 4)), "pack", 4),  # a GPU without a CPU is of no use
        (((8, 1),), "pack", 8),  # not even the narrowest: it waits for what was asked for
        ((), "pack", 8),
    ],
)
def test_the_world_size_is_the_largest_that_the_cluster_can_hold(
    alive: tuple[tuple[int, int], ...], placement: str, expected: int
) -> None:
    job = make_job(Path(), workers=8, fallback_world_sizes=(4, 2), device="cuda", placement=placement)
    assert choose_world_size(nodes(*alive), job) == expected


def test_killed_at_a_random_moment_the_same_command_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """A short benchmarks/chaos.py."""
    chaos = load_chaos()
    log = tmp_path / "lines.txt"
    whole, killed = (chaos.Case("local", tmp_path / name, 8, 128, log) for name in ("whole", "killed"))
    reference, *_ = chaos.measure_whole(whole)
    chance = random.Random(0)
    strikes = [chaos.Strike("group", epoch, chance.uniform(0, 0.3)) for epoch in (2, 5)]
    outcome, readings = chaos.try_once(killed, strikes, chance)
    assert outcome == reference, readings
    assert "killed group" in log.read_text().splitlines(), "what was done stands among what was printed"
    assert [reading["interrupted"] for reading in readings] == [True, True], readings
    (stored,) = load_records([tmp_path / "killed"]).records
    assert [attempt["reason"] for attempt in stored.record.environment["attempts"]] == [
        "",
        "the command was given again",
        "the command was given again",
    ]


def toy(spec: dict[str, Any], worker: Worker, report: Any) -> dict[str, Any]:
    """Reports once and lasts `seconds` in its first attempt."""
    report({"epoch": 0})
    if worker.attempt == 1:
        time.sleep(spec["seconds"])
    return {"attempt": worker.attempt}


class ToySampler:
    """Stands for a node's telemetry: takes two samples."""

    def __init__(self, visible: str | None) -> None:
        assert visible == "", "a run without GPUs"

    def stop(self) -> str:
        return "2 samples"


def make_job(storage: Path, **options: Any) -> Allocation:
    return Allocation(
        **{"workers": 1, "concurrent_runs": 1, "device": "cpu", "threads": 1, "storage": storage, **options}
    )


def kill_controller() -> int:
    """SIGKILL to Ray Train's controller, the process between this one and its workers. How many there were."""
    ours = load_chaos().descendants(os.getpid(), "TrainController")
    for pid in ours:
        os.kill(pid, signal.SIGKILL)
    return len(ours)


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[Cluster]:
    yield connect(None, cpus=1, gpus=0)
    disconnect()


@pytest.mark.ray
def test_a_dead_controller_leaves_its_room_to_the_next_attempt(one_cpu: Cluster, tmp_path: Path) -> None:
    """The first attempt has to wait until there is room."""
    import ray
    from ray.util import placement_group, placement_group_table, remove_placement_group

    assert one_cpu == (Node(cpus=1, gpus=0),)
    taken = placement_group([{"CPU": 1}])
    until = time.monotonic() + 10
    while time.monotonic() < until and ray.available_resources().get("CPU"):
        time.sleep(0.1)
    events: list[Any] = []
    killed: list[int] = []

    def progress(spec: Any, event: Any) -> None:
        events.append(event)
        if isinstance(event, Waiting):
            remove_placement_group(taken)
        if event == {"epoch": 0} and not killed:
            killed.append(kill_controller())

    runs = launch(
        toy, [{"seconds": 60}], make_job(tmp_path / "ray", placement_timeout_seconds=60),
        progress=progress, telemetry=ToySampler,
    )  # fmt: skip
    ((_, outcome),) = list(runs)
    assert killed == [1]
    assert outcome == {"attempt": 2}, "the room of attempt 1 was not given back"
    assert (type(events[0]), events[0].reason) == (Waiting, "1 CPU wanted, 0 free")
    assert [event for event in events if isinstance(event, Started)][1].reason
    assert Entered() in events
    until = time.monotonic() + 10
    while time.monotonic() < until and ray.available_resources().get("CPU") != 1.0:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 1.0
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    assert [event.node for event in events if isinstance(event, Telemetry)] == ["2 samples"], "of the last attempt"
    until = time.monotonic() + 10
    while (left := samplers()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left, "an attempt's samplers end with it, however it ends"


def samplers() -> list[int]:
    """The processes that measure a node."""
    return load_chaos().descendants(os.getpid(), ToySampler.__name__)


def listening_addresses(pids: set[int]) -> set[str]:
    """Local addresses, in the kernel's hexadecimal, on which these processes wait for TCP connections."""
    sockets = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(path.readlink().name)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].split(":")[0])
    return found


def look_at_sockets(spec: Any, worker: Worker, report: Any) -> set[str]:
    """Where a rank's own process listens while its process group is up."""
    import torch.distributed as dist

    assert dist.is_initialized()
    dist.barrier()
    return {address.removeprefix("0000000000000000FFFF0000") for address in listening_addresses({os.getpid()})}


@pytest.mark.ray
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_a_cluster_of_this_machine_listens_on_loopback_alone(one_cpu: Cluster, tmp_path: Path) -> None:
    assert ask_every_node(os.getpid)
    runs = launch(look_at_sockets, [{}], make_job(tmp_path), progress=lambda *_: None)
    ((_, of_rank),) = list(runs)
    assert of_rank <= {"0100007F"}, "gloo's"
    found = listening_addresses(set(load_chaos().descendants(os.getpid(), "")))
    assert found, "a cluster that listens nowhere?"
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F"}


@pytest.mark.ray
def test_waiting_for_room_is_shown_and_ends(one_cpu: Cluster, tmp_path: Path) -> None:
    events: list[Any] = []
    began = time.monotonic()
    runs = launch(
        toy, [{"seconds": 0}], make_job(tmp_path / "ray", workers=2, placement_timeout_seconds=5),
        progress=lambda _, event: events.append(event),
    )  # fmt: skip
    ((_, outcome),) = list(runs)
    assert isinstance(outcome, Failed)
    assert outcome.died
    assert "no room in the cluster for 2 x 1 CPU" in outcome.message
    (waiting,) = events
    assert isinstance(waiting, Waiting)
    assert waiting.reason == "2 CPU wanted, 1 free"
    assert 5 <= time.monotonic() - began < 20


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_run_that_ends_with_fewer_workers_lets_them_go(one_cpu: Cluster, tmp_path: Path) -> None:
    """They waited for another run, and the command with them."""
    job = make_job(tmp_path / "ray", workers=2, fallback_world_sizes=(1,))
    runs = launch(toy, [{"seconds": 0}] * 2, job, progress=lambda *_: None, row=lambda _: "one")
    assert [outcome for _, outcome in runs] == [{"attempt": 1}] * 2


@pytest.mark.ray
def test_every_node_answers_or_says_why_not(one_cpu: Cluster) -> None:
    def ask() -> int:
        return os.getpid()

    def broken() -> int:
        raise FileNotFoundError("no /shared here")

    def endless() -> int:
        time.sleep(60)
        return 0

    (pid,) = ask_every_node(ask).values()
    assert pid != os.getpid()
    assert list(ask_every_node(broken).values()) == [Unanswered(reason="FileNotFoundError: no /shared here")]
    (answer,) = ask_every_node(endless, timeout_seconds=1).values()
    assert answer == Unanswered(reason="no answer within 1 seconds")


def nodes(*sizes: tuple[int, int]) -> Cluster:
    return tuple(Node(cpus=cpus, gpus=gpus) for cpus, gpus in sizes)


@pytest.mark.parametrize(
    ("cluster", "workers", "concurrent_runs", "gpu", "placement", "expected"),
    [
        (nodes((8, 0)), 2, 1, False, "pack", (1, 4)),
        (nodes((1, 0), (3, 0)), 2, 1, False, "pack", (1, 1)),  # 2 CPUs a worker would fit once
        (nodes((0, 0), (4, 0), (4, 0)), 2, 1, False, "spread", (1, 4)),
        (nodes((4, 0), (4, 0)), 2, 1, False, "strict-pack", (1, 2)),
        (nodes((4, 0), (4, 0)), 8, 1, False, "strict-pack", (0, 0)),
        (nodes((64, 8), (64, 8)), 8, 2, True, "strict-pack", (2, 8)),
        (nodes((64, 8), (64, 8)), 16, 1, True, "strict-pack", (0, 0)),
        (nodes((64, 8), (64, 8)), 16, 1, True, "pack", (1, 8)),
        (nodes((96, 0), (8, 8)), 4, 2, True, "pack", (2, 1)),  # the head's CPUs are of no use to a GPU
        (nodes((12, 6), (12, 6)), 4, 3, True, "strict-pack", (2, 3)),  # a third would lie across
    ],
)
def test_runs_are_laid_over_nodes_as_they_are(
    cluster: Cluster, workers: int, concurrent_runs: int, gpu: bool, placement: str, expected: tuple[int, int]
) -> None:
    job = make_job(Path(), workers=workers, concurrent_runs=concurrent_runs, device="cuda" if gpu else "cpu", placement=placement)  # fmt: skip
    found = fit(cluster, job)
    assert (found.concurrent_runs, found.threads)[: 1 + bool(expected[0])] == expected[: 1 + bool(expected[0])]


def test_runs_that_share_gpus_fit_as_often_as_there_are_shares_and_cpus() -> None:
    for cluster, share, expected in ((nodes((64, 8)), 3, (24, 2)), (nodes((8, 4)), 4, (8, 1))):
        found = fit(cluster, make_job(Path(), device="cuda", runs_per_gpu=share, concurrent_runs=99))
        assert (found.concurrent_runs, found.threads) == expected


class WorkerGroupError(Exception):
    """Carries what Ray Train's carries."""

    def __init__(self, *errors: BaseException) -> None:
        self.worker_failures = dict(enumerate(errors))


class ActorDiedError(Exception):
    """Named as Ray's."""


def test_the_cause_is_told_from_its_consequences() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.3]:60000")
    alone = make_failed(WorkerGroupError(lost), attempts=1)
    assert (alone.died, alone.exception) == (True, ""), "its peer is gone: to be tried again"
    own = make_failed(WorkerGroupError(lost, ValueError("a bug")), attempts=1)
    assert (own.died, own.exception, own.message) == (False, "ValueError", "a bug")
    killed = make_failed(WorkerGroupError(lost, ValueError("a bug"), ActorDiedError("node")), attempts=1)
    assert killed.died
    plain = make_failed(WorkerGroupError(RuntimeError("shape mismatch")), attempts=1)
    assert not plain.died


def test_a_failure_of_dali_says_what_it_was() -> None:
    pipeline = dali.dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        images = dali.fn.external_source(lambda _: [np.zeros((5, 5, 3), np.uint8)], layout="HWC")
        pipeline.set_outputs(dali.fn.crop(images, crop=(9, 9)))
    pipeline.build()
    with pytest.raises(RuntimeError) as failure:
        pipeline.run()
    assert make_failed(failure.value, attempts=1).message.startswith("Slice can't be placed out of bounds")


class AcceleratorError(RuntimeError):
    """Named as torch's."""


def test_an_error_of_a_gpu_is_tried_again_on_another_and_one_of_the_program_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.3]:60000")
    error = AcceleratorError(
        "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"
    )
    failed = make_failed(WorkerGroupError(lost, error), attempts=1)
    assert (failed.exception, failed.message) == ("AcceleratorError", "CUDA error: unspecified launch failure")
    assert is_of_device(error)
    # as torch 2.11 ends all of them
    hint = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    assert is_of_device(AcceleratorError(f"CUDA error: uncorrectable ECC error encountered\n{hint}"))
    said = (
        "Error in GPU operator `nvidia.dali.fn.resize`\nCUDA runtime API error cudaErrorIllegalAddress (700):\n{}"
    )
    assert is_of_device(RuntimeError(said.format("an illegal memory access was encountered")))
    assert not is_of_device(RuntimeError(said.format("out of memory")))
    assert not is_of_device(RuntimeError("shapes differ"))
    for own in (
        "out of memory",
        "device-side assert triggered",
        "operation not permitted when stream is capturing",
    ):
        assert not is_of_device(AcceleratorError(f"CUDA error: {own}"))

    held = list[Any]()
    monkeypatch.setattr("harness.cluster.launch.hold_gpu", lambda *gpu: held.append(gpu) or gpu)
    monkeypatch.setattr("harness.cluster.launch.inspect_cluster", lambda *_: nodes((6, 6)))
    driver: Any = _Driver(
        Task(lambda *_: None, make_job(tmp_path, workers=2, retries=2), None, None), ["run", "other"]
    )
    run = _Run(driver, 0)
    broken = iter("0123")
    monkeypatch.setattr(run, "_read", lambda key: ("node", next(broken)) if key[0] == "broken" else None)
    assert run._judge(failed) is None
    assert run._judge(failed) is None
    assert held == [("node", "0"), ("node", "1")]
    driver.set_aside(1, "node", "2")
    assert held == [("node", "0"), ("node", "1")], "a run of two workers needs the others"
    assert run._judge(failed) is failed
    assert not driver.held, "on three GPUs: it is the run"
    driver.job = replace(driver.job, runs_per_gpu=2)
    driver.set_aside(1, "node", "2")
    assert not driver.held, "another run uses the GPU, too"


@pytest.mark.parametrize("others", [(), (ActorDiedError("node"),), (RuntimeError("Connection closed by peer"),)])
def test_a_rank_that_stalls_is_named_in_the_record(others: tuple[Exception, ...]) -> None:
    named = "rank 1 on node7 gives no sign of life; rank 0 has waited 240 s for it"
    failed = make_failed(WorkerGroupError(*others, RankStalledError(named)), attempts=3)
    assert (failed.died, failed.message) == (True, named), "tried again, and with its own words"
    failure = classify(failed)
    assert (failure.kind, failure.message) == ("killed", named)
