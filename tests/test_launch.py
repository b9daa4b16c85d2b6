"""Runs through Ray Train and in this process: results, progress, failures, retries, refusals."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

import harness.cluster.connect
from harness.cluster.connect import ClusterError, connect, disconnect
from harness.cluster.job import (
    Allocation,
    Ended,
    Entered,
    Failed,
    PreemptedError,
    Started,
    Worker,
    WorkerDiedError,
)
from harness.cluster.launch import _Driver, _Run, launch, launch_here
from harness.cluster.nodes import MOST_LOST, Node, Patience, count_runs, find_free, hold_gpu
from harness.cluster.workers import Mailbox, Task

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class TooBigError(Exception):
    """Stands for an error of the train function."""


def toy(spec: dict[str, Any], worker: Worker, report: Any) -> dict[str, Any]:
    """A run that does what its spec says, in every rank."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(worker.rank + 1)])
    if worker.world_size > 1:
        dist.all_reduce(total)
    leaves, dies = (worker.attempt in spec.get(what, ()) for what in ("leaves", "dies"))
    first = worker.attempt if dies else 0  # a death after progress; one that leaves brings none
    for epoch in range(first, first + spec["epochs"]):
        report({"epoch": epoch, "rank": worker.rank})
    if leaves:
        raise PreemptedError("stopped before epoch 2")
    last = worker.rank == worker.world_size - 1
    if dies and last:
        time.sleep(2.0)  # let the reports out, on a busy machine too
        os._exit(1)
    if spec.get("raises") and not dies and last:
        raise TooBigError("does not fit\nsecond line")
    if worker.world_size > 1:
        dist.barrier()
    return {"total": total.item(), "attempt": worker.attempt, "threads": worker.threads, "device": worker.device,
            "order": os.environ.get("CUDA_DEVICE_ORDER"), "nice": os.nice(0)}  # fmt: skip


def make_job(storage: Path, **options: Any) -> Allocation:
    return Allocation(
        **{"workers": 1, "concurrent_runs": 1, "device": "cpu", "threads": 1, "storage": storage, **options}
    )


def collect(
    runs: Any, specs: list[dict[str, Any]], job: Allocation, **options: Any
) -> tuple[dict[str, Any], list[Any]]:
    events: list[Any] = []
    outcomes = {
        spec["name"]: outcome
        for spec, outcome in runs(toy, specs, job, progress=lambda s, e: events.append((s["name"], e)), **options)
    }
    return outcomes, events


@pytest.mark.ray
def test_ray_runs_leaves_fails_and_retries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second run begins in the first one's workers. Ray itself prints nothing: standard output may be a program's."""
    cluster = connect(None, cpus=2, gpus=0)
    try:
        assert cluster == (Node(cpus=2, gpus=0),)
        specs: list[dict[str, Any]] = [
            {"name": "good", "epochs": 2},
            {"name": "bad", "epochs": 1, "dies": (1, 3), "leaves": (2,), "raises": True},
        ]
        outcomes, events = collect(
            launch, specs, make_job(tmp_path / "ray", workers=2, retries=1),
            progress_of=lambda event: event["epoch"] + 1 if isinstance(event, dict) else 0, row=lambda _: "one",
        )  # fmt: skip
    finally:
        disconnect()
    assert capfd.readouterr().out == ""
    expected = {"total": 3.0, "attempt": 1, "threads": 1, "device": "cpu", "order": "PCI_BUS_ID"}
    assert outcomes["good"] == expected | {"nice": os.nice(0)}, "as important as this process"
    failed = outcomes["bad"]
    assert isinstance(failed, Failed)
    assert (failed.exception, failed.message, failed.died) == ("TooBigError", "does not fit", False)
    assert failed.attempts == 4, "two deaths of one retry: it had come further; and an exception would come again"
    assert "second line" in failed.traceback
    assert re.search(r'File ".*test_launch.py", line \d+, in toy', failed.traceback), "which Ray does not send"
    of_good = [e for name, e in events if name == "good"]
    assert of_good == [Started(attempt=1), Entered(), {"epoch": 0, "rank": 0}, {"epoch": 1, "rank": 0}]
    again = [e for name, e in events if name == "bad" and isinstance(e, Started)]
    assert [e.attempt for e in again] == [1, 2, 3, 4]
    assert ["died" in e.reason for e in again] == [False, True, False, True]
    assert again[2].reason == "a worker had to leave: stopped before epoch 2", "which is no death"
    assert not (tmp_path / "ray").exists()


@pytest.mark.ray
def test_no_thread_is_left_that_could_call_ray_after_its_end(tmp_path: Path) -> None:
    """Ray would end the process with 1, by a line of its C++: while workers start, and while they train."""

    def stop_at(kind: type, event: Any) -> None:
        if isinstance(event, kind):
            raise KeyboardInterrupt

    connect(None, cpus=1, gpus=0)
    try:
        for kind in (Started, Entered):
            specs = [{"name": "long", "epochs": 10**9}]
            with pytest.raises(KeyboardInterrupt):
                list(launch(toy, specs, make_job(tmp_path), progress=lambda _, e: stop_at(kind, e)))  # noqa: B023
            assert not [thread for thread in threading.enumerate() if "_serve" in thread.name], kind
    finally:
        disconnect()


@pytest.mark.ray
def test_a_gpu_that_is_held_is_given_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts GPUs that are not there."""
    import ray

    connect(None, cpus=1, gpus=3)
    try:
        node = ray.get_runtime_context().get_node_id()
        holder = hold_gpu(node, "1")
        look: Any = ray.remote(num_cpus=0, num_gpus=2)(
            lambda: ray.get_runtime_context().get_accelerator_ids()["GPU"]
        )
        assert sorted(ray.get(look.remote())) == ["0", "2"]
        monkeypatch.setattr("harness.cluster.nodes.HOLD_SECONDS", 3.0)
        assert hold_gpu(node, "1") is None, "it is held already"
        assert sorted(ray.get(look.remote())) == ["0", "2"]
        del holder
        assert len(ray.get(look.options(num_gpus=3).remote())) == 3
    finally:
        disconnect()


def test_local_has_the_same_signature_and_outcomes(tmp_path: Path) -> None:
    specs = [{"name": "good", "epochs": 1}, {"name": "raises", "epochs": 0, "raises": True}]
    outcomes, events = collect(launch_here, specs, make_job(tmp_path))
    assert outcomes["good"]["total"] == 1.0
    assert isinstance(outcomes["raises"], Failed)
    assert outcomes["raises"].exception == "TooBigError"
    assert events[0] == ("good", Started(attempt=1))
    with pytest.raises(ValueError, match="one worker, not 2"):
        collect(launch_here, specs, make_job(tmp_path, workers=2))


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:x", "127.0.0.1:1"])
def test_an_address_that_cannot_be_is_refused_at_once(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=address):
        connect(address, cpus=1, gpus=0)
    assert time.monotonic() - began < 5


def test_workers_of_any_cluster_number_gpus_as_nvml_does_and_are_not_niced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cluster's nodes have an environment of their own; one in this machine inherits ours."""
    import ray

    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **given: options.update(given))
    monkeypatch.setattr(harness.cluster.connect, "_check_alive", lambda _: None)
    monkeypatch.setattr(harness.cluster.connect, "inspect_cluster", lambda: None)
    monkeypatch.setattr(harness.cluster.connect, "_watch", lambda: None)
    connect("10.0.0.1:6379", cpus=1, gpus=0)
    handed_on = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "RAY_worker_niceness": "0",
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
    }
    assert options["runtime_env"] == {"env_vars": handed_on}
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    connect(None, cpus=1, gpus=0)
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_ctrl_c_while_ray_starts_ends_what_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray._private.services as services

    begun = list[Any]()

    def start(**_: Any) -> None:
        begun.append(services.ConsolePopen(["sleep", "60"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(KeyboardInterrupt):
        connect(None, cpus=1, gpus=0)
    assert begun[0].wait(10) == -signal.SIGKILL
    assert services.ConsolePopen is not type(begun[0]), "for this start alone"


def test_what_is_free_is_known_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs on two nodes are no room for a worker of two."""
    free = {
        "a": {"CPU": 1.0, "memory": 9e9},
        "b": {"CPU": 1.0, "GPU": 1.0},
        "leaves": {"CPU": 8.0},
        "bad": {"CPU": 8.0},
    }
    state = SimpleNamespace(available_resources_per_node=lambda: free)
    monkeypatch.setattr("ray._private.state.state", state)
    monkeypatch.setattr("harness.cluster.nodes.find_draining", lambda: {"leaves": 0.0})
    found = find_free(["bad"])
    assert found == (Node(cpus=1, gpus=0), Node(cpus=1, gpus=1))
    assert count_runs(found, Allocation(device="cpu", workers=1, concurrent_runs=1, threads=2)) == 0
    assert count_runs(found, Allocation(device="cpu", workers=2, concurrent_runs=1, threads=1)) == 1


def test_a_long_folder_for_temporary_files_and_a_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    given: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(harness.cluster.connect, "inspect_cluster", lambda: None)
    monkeypatch.setattr(harness.cluster.connect, "_watch", lambda: None)
    connect(None, cpus=1, gpus=0)
    assert "_temp_dir" not in given
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "long" * 10)  # a socket's name has 107 bytes
    connect(None, cpus=1, gpus=0)
    assert given["_temp_dir"] == "/tmp/ray"

    def fail(**options: Any) -> None:
        raise OSError("AF_UNIX path length cannot exceed 107 bytes\nand more")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ClusterError, match=r"^Ray does not start here: AF_UNIX path .* 107 bytes$"):
        connect(None, cpus=1, gpus=0)


@pytest.mark.parametrize(("ends", "says"), [("os._exit(1)", True), ("disconnect()", False)])
def test_a_command_that_ray_ends_says_that_it_can_go_on(ends: str, says: bool) -> None:
    """Ray's library ends the driver where raylet or head are gone, and runs no code of ours."""
    code = f"""import os, ray
from harness.cluster.connect import _watch, disconnect
ray.shutdown = lambda: None
_watch()
{ends}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ("goes on from the last checkpoints" in done.stderr) == says, done.stderr


@pytest.mark.parametrize(("before", "after"), [(None, 0), ("token", 1)])
def test_a_cluster_of_its_own_leaves_no_token_mode_behind(before: str | None, after: int) -> None:
    """A notebook may join another cluster afterwards, one without tokens. Ray's own functions, but no cluster."""
    code = """import os, ray
from harness.cluster import connect
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray._raylet import AuthenticationTokenLoader, get_authentication_mode
ray.init, ray.shutdown, connect.inspect_cluster = (lambda **_: enable_token_auth_by_default()), (lambda: None), (lambda: None)
connect.connect(None, cpus=1, gpus=0)
assert (get_authentication_mode(), os.environ["RAY_AUTH_MODE"]) == (1, "token")
AuthenticationTokenLoader.instance().has_token()
connect.disconnect()
print(int(get_authentication_mode()), os.environ.get("RAY_AUTH_MODE"))"""
    own = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    own |= {"RAY_AUTH_MODE": before} if before else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own, timeout=60)
    assert done.stdout.split() == [str(after), str(before)], done.stderr


def test_private_names_of_ray_that_are_used_exist() -> None:
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
    from ray.train.v2._internal.execution.controller import TrainController

    assert "controller.get_result" in inspect.getsource(TorchTrainer._initialize_and_run_controller)
    assert "callbacks=self._create_default_callbacks()" in inspect.getsource(TorchTrainer.fit)
    assert hasattr(TrainController, "get_result"), "as Ray's own"
    assert "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC" in ENV_VARS_TO_PROPAGATE
    assert issubclass(ray.train.TrainingFailedError, Exception)


def test_a_death_counts_against_the_limit_unless_the_run_had_come_further(tmp_path: Path) -> None:
    driver: Any = SimpleNamespace(job=make_job(tmp_path, retries=2), mailbox=None, best_progress=[0.0])
    run, counted = _Run(driver, 0), []
    died = Failed(exception="", message="killed", traceback="", died=True)
    for progress in (0, 0, 3, 3, 3, 4, 4):  # the furthest epoch reported before each death
        driver.best_progress[0] = progress
        final = run._judge(died)
        counted.append(run.patience.deaths)
        assert (final is None) == (run.patience.deaths <= 2)
    assert counted == [1, 2, 1, 2, 3, 1, 2]


def test_a_death_beside_a_node_that_leaves_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"lost before"}
    monkeypatch.setattr("harness.cluster.nodes.find_leaving", lambda: set(gone))
    patience, ended = Patience(retries=1), []
    for node in ("lost before", "drained", "drained", "lost", "lost", "lost"):
        gone.add(node)
        ended.append(patience.ends(0.0))
    assert ended == [False, False, False, False, False, True]


def test_a_node_that_was_lost_long_ago_excuses_nothing_when_the_cluster_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([{"old"}, set(), {"old"}, set(), {"old"}])
    monkeypatch.setattr("harness.cluster.nodes.find_leaving", lambda: next(answers))
    patience = Patience(retries=1)
    assert [patience.ends(0.0) for _ in range(4)] == [False, True, True, True]


def test_a_run_that_ends_every_node_it_is_given_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: set[str] = set()
    monkeypatch.setattr("harness.cluster.nodes.find_leaving", lambda: set(gone))
    patience, ended = Patience(retries=1), []
    for number in range(MOST_LOST + 2):
        gone.add(f"lost {number}")
        ended.append(patience.ends(0.0))
    assert ended == [False] * (MOST_LOST + 1) + [True]
    gone.add("another")
    assert not patience.ends(1.0), "it went on meanwhile"


def test_shares_of_a_gpu_add_up_to_no_more_than_one_in_rays_four_decimals(tmp_path: Path) -> None:
    for runs in range(1, 33):
        job = make_job(tmp_path, device="cuda", runs_per_gpu=runs)
        assert round(job.resources["GPU"], 4) * runs <= 1
        assert (job.resources["GPU"] + 1e-4) * runs > 1, "no room for one more"
    assert make_job(tmp_path).resources == {"CPU": 1.0}


def test_a_failure_after_the_command_was_stopped_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray has ended by then: what a run's thread reports to it would end in a traceback on the screen."""
    job = Allocation(device="cpu", workers=1, concurrent_runs=1, threads=1)
    driver = _Driver(Task(lambda *_: None, job, None, None), ["run"])
    said: list[Any] = []

    class Run:
        def __init__(self, *_: Any) -> None: ...

        def run(self) -> None:
            driver.stop.set()
            raise RuntimeError("Ray has ended")

        def put(self, event: Any) -> None:
            said.append(event)

    monkeypatch.setattr("harness.cluster.launch._Run", Run)
    driver._serve(driver.take())
    assert not said


def test_a_run_waits_for_room_as_long_as_others_of_its_command_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.cluster.launch.find_lacking", lambda *_: "1 GPU wanted")
    monkeypatch.setattr("harness.cluster.launch.GIVE_BACK_SECONDS", 0.1)
    driver: Any = SimpleNamespace(
        job=make_job(tmp_path, placement_timeout_seconds=0.5),
        mailbox=None,
        training={(1, 1): 1},
        held={0: ["a GPU that is set aside"]},
        stop=threading.Event(),
    )
    answers = list[Any]()
    thread = threading.Thread(target=lambda: answers.append(_Run(driver, 0)._wait_for_resources()))
    thread.start()
    thread.join(1.5)
    assert not answers, "no failure while another run of the command has the room"
    assert driver.held
    driver.training.clear()
    thread.join(5)
    assert answers == [None]
    assert not driver.held, "a GPU that may be broken is better than none"


def test_waits_of_several_attempts_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = SimpleNamespace(remote=lambda *_: None)
    mailbox = SimpleNamespace(note=remote, read=remote, close=remote, put=remote)
    driver: Any = SimpleNamespace(
        job=make_job(tmp_path, retries=5), mailbox=mailbox, training={}, best_progress=[0.0],
        stop=threading.Event(),
    )  # fmt: skip
    run, waits = _Run(driver, 0), list[float]()

    def wait() -> int | None:
        waits.append(run.waited_seconds)
        run.waited_seconds += 1200
        return 1 if len(waits) < 3 else None

    def fit() -> None:
        raise WorkerDiedError("killed")

    monkeypatch.setattr(run, "_wait_for_resources", wait)
    monkeypatch.setattr(run, "_make_trainer", lambda _: SimpleNamespace(fit=fit))
    monkeypatch.setattr("ray.get", lambda *_, **__: 0)
    monkeypatch.setattr(run, "_read", lambda _: None)
    run.run()
    assert waits == [0, 0, 0]


def test_an_attempt_that_was_given_up_is_heard_no_more() -> None:
    """Its rank 0 may live on, behind a cut link: its outcome would count beside the next attempt's."""
    mailbox = Mailbox()
    mailbox.note(("attempt", 0), 1)
    assert mailbox.put(0, "epoch", 1)
    assert mailbox.close(0) == 0
    assert not mailbox.put(0, Ended(outcome="late"), 1)
    mailbox.note(("attempt", 0), 2)
    assert mailbox.put(0, Ended(outcome="right"), 2)
