"""Many runs on the GPUs of a Ray cluster: each one a DDP job of Ray Train, several at a time where they fit.

Generic over what is run: `train(spec, worker, report)` is called once in each of a run's workers, inside an
initialised process group (NCCL on GPUs, gloo on CPUs) when there are several. Ray is imported when it is used.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from ray.train import Result

Spec = TypeVar("Spec")
Outcome = TypeVar("Outcome")
Report = Callable[[Any], None]

CONNECT_SECONDS = 20.0
WAIT_SECONDS = 1800.0  # for room in the cluster: as long as a cloud may take to bring another node
SHOW_WAIT_SECONDS = 10.0
LOOPBACK = "127.0.0.1"
PLACEMENTS = ("pack", "strict-pack", "spread")
COLLECTIVE_SECONDS = 300  # a peer that stops without dying is noticed after this, not after torch's 30 minutes

_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # also the pace at which reports are taken: 2 s by default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that asks Ray after the end would start it again
}


class ClusterError(RuntimeError):
    """The cluster cannot be reached or has too little; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What one worker of a run knows about its place."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"  # "cuda:0" or "cpu"
    threads: int = 1
    attempt: int = 1
    runs_per_gpu: int = 1
    launch_seconds: float = (
        0.0  # from asking for the attempt until its function was entered (two clocks on two nodes)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A run that gave no result. `died` means that a process ended without an exception of its own."""

    exception: str  # type name, "" for a death
    message: str
    traceback: str
    died: bool
    attempts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """Progress: an attempt at a run begins (its workers are being placed)."""

    attempt: int
    reason: str = ""  # why there is another attempt
    workers: int | None = None  # where these are fewer than were asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Entered:
    """Progress: the attempt's workers are placed and its train function was entered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Progress: an attempt cannot begin, the cluster has too little room now."""

    seconds: float  # so far
    reason: str  # "2 GPU wanted, 1 free"


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """Progress: an attempt ends well, and this is what was seen of one of its nodes."""

    node: Any


class Watching(Protocol):
    """Something that looks at a node in its own thread."""

    def stop(self) -> Any:
        """End it; what it saw."""


Watch = Callable[[str | None], Watching]
"""Starts to look at the node it is called on; the argument is CUDA_VISIBLE_DEVICES of a run's workers there: "" of a
run without GPUs, None for all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one node has, in whole CPUs and GPUs."""

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What a cluster has, node by node."""

    members: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.members)

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.members)

    @property
    def nodes(self) -> int:
        """How many nodes are alive."""
        return len(self.members)


def connect(address: str | None, *, cpus: int, gpus: int, verbose: bool = False) -> Cluster:
    """Join the Ray cluster at `address`, or start one in this machine with so many CPUs and GPUs.

    Raises ClusterError where no cluster answers within 30 seconds: 10 for TCP, 20 for Ray.
    """
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    if address is not None:
        _check_alive(address)
    import ray

    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": "INFO" if verbose else "ERROR",
    }
    if address is None:
        options |= {"num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False, "address": "local"}
        options["object_store_memory"] = 256 * 2**20  # nothing large travels through Ray
        options["_node_ip_address"] = LOOPBACK
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        options["address"] = address
    try:
        with _staying_on_loopback() if address is None else contextlib.nullcontext():
            ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ClusterError(f"no Ray cluster answers at {address!r}: {first}") from None
    return _look()


def _look() -> Cluster:
    """The nodes that are alive, as far as Ray has noticed."""
    import ray

    has = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(members=tuple(Node(cpus=int(h.get("CPU", 0)), gpus=int(h.get("GPU", 0))) for h in has))


def count_runs(cluster: Cluster, *, workers: int, threads: int, gpu: bool, placement: str) -> int:
    """How many runs of `workers` workers with `threads` CPUs each an idle cluster could hold."""
    room = [min(n.cpus // threads, n.gpus) if gpu else n.cpus // threads for n in cluster.members]
    if placement == "strict-pack":
        return sum(r // workers for r in room)
    return sum(room) // workers


def choose_width(cluster: Cluster, widths: Sequence[int], *, threads: int, gpu: bool, placement: str) -> int:
    """The widest of `widths` (widest first) of which the cluster can hold a run; the first where it can hold none.

    What other runs use now is not looked at: a run waits for them, and goes on narrower only where the cluster
    itself has become too small.
    """
    for workers in widths:
        if count_runs(cluster, workers=workers, threads=threads, gpu=gpu, placement=placement):
            return workers
    return widths[0]


def fit(cluster: Cluster, *, workers: int, concurrent_runs: int, gpu: bool, placement: str) -> tuple[int, int]:
    """How many of `concurrent_runs` runs of `workers` workers can go on at a time, and with how many CPUs a worker.

    The most CPUs a worker with which the most runs go on; (0, 0) where not one run can be placed.
    """

    def runs(threads: int) -> int:
        return min(
            concurrent_runs, count_runs(cluster, workers=workers, threads=threads, gpu=gpu, placement=placement)
        )

    most = runs(1)
    if not most:
        return 0, 0
    threads = 1
    while threads * workers * most < cluster.cpus and runs(threads + 1) == most:
        threads += 1
    return most, threads


@contextlib.contextmanager
def _staying_on_loopback() -> Iterator[None]:
    """A cluster of this machine alone listens on 127.0.0.1: Ray would put the machine's own address in its place,
    and then listen on all of them."""
    import ray._private.services as services

    before = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = before


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends with this, and every process in it."""
    import ray

    ray.shutdown()


def _check_alive(address: str) -> None:
    """Fail early and clearly: ray.init would retry for minutes and then end the process."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ClusterError(f"--address {address!r} is not HOST:PORT or auto")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ClusterError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    try:
        done = subprocess.run(
            command if address == "auto" else [*command, "--address", address],
            capture_output=True,
            timeout=CONNECT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"no Ray cluster answers at {address!r} within {CONNECT_SECONDS:.0f} seconds") from None
    if done.returncode:
        raise ClusterError(f"no Ray cluster answers at {address!r}: `ray health-check` says no")


def launch(
    train: Callable[[Spec, Worker, Report], Outcome],
    specs: Sequence[Spec],
    *,
    workers: int,
    concurrent_runs: int,
    gpu: bool,
    threads: int,
    storage: Path | str,
    progress: Callable[[Spec, Any], None],
    retries: int = 2,
    placement: str = "pack",
    placement_timeout_seconds: float = WAIT_SECONDS,
    fewer: Sequence[int] = (),
    watch: Watch | None = None,
    reached: Callable[[Any], float] = lambda _: 0.0,
) -> Iterator[tuple[Spec, Outcome | Failed]]:
    """Run every spec, `concurrent_runs` at a time with `workers` processes each; yield each as it ends.

    A worker that dies (killed, out of host memory, node lost) is retried; an exception is not, since it would
    come again. `retries` are those in a row that came no further than the ones before: `reached(event)` says how far
    a run has come by what rank 0 reported. An attempt that finds no room, since a node was lost or others use the cluster, waits for it
    without counting, up to `placement_timeout_seconds` in all. `progress(spec, event)` is called in this thread with `Started`,
    `Waiting`, `Entered` and with everything that rank 0 reports. Call `connect` before. `storage` is for Ray's own
    files and must be seen by every node: a shared folder, or a URI that pyarrow opens. `placement`: pack prefers one node for a run's workers, strict-pack
    insists on it, spread prefers many. `fewer`, widest first: with how many workers an attempt may go on instead,
    where the cluster has lost so much that it cannot hold `workers`; the next attempt after it has grown again is
    of `workers`. `watch` is called on each node of an attempt, in an actor that ends with it; what it saw comes as
    `Watched`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Board:
        """Callbacks of Ray Train run in another process: what they see waits here for the driver."""

        def __init__(self) -> None:
            self.events: list[tuple[int, Any]] = []
            self.placed: dict[int, Any] = {}

        def put(self, index: int, event: Any) -> None:
            self.events.append((index, event))

        def drain(self) -> list[tuple[int, Any]]:
            events, self.events = self.events, []
            return events

        def place(self, index: int, group: Any) -> None:
            self.placed[index] = group

        def displace(self, index: int) -> Any:
            return self.placed.pop(index, None)

    # beside the driver: on another node it would be lost with that node, and every run with it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    furthest = [0.0] * len(specs)
    stop = threading.Event()
    for index in range(len(specs)):
        waiting.put(index)

    def serve() -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcome = _run_one(
                    train, specs[index], index, board,
                    workers=workers, gpu=gpu, threads=threads, storage=storage, retries=retries, stop=stop,
                    placement=placement, placement_timeout_seconds=placement_timeout_seconds, fewer=fewer, watch=watch,
                    furthest=furthest,
                )  # fmt: skip
            except BaseException as error:
                outcome = make_failed(error, attempts=1)
            ended.put((index, outcome))

    for _ in range(min(concurrent_runs, len(specs))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for _ in specs:
            done: tuple[int, Any] | None = None
            while done is None:
                with contextlib.suppress(queue.Empty):
                    done = ended.get(timeout=0.2)
                for index, event in ray.get(board.drain.remote()):
                    furthest[index] = max(furthest[index], reached(event))
                    progress(specs[index], event)
            yield specs[done[0]], done[1]
    finally:
        stop.set()
        ray.kill(board)
        _remove(storage)


def _remove(storage: Path | str) -> None:
    if isinstance(storage, Path):
        shutil.rmtree(storage, ignore_errors=True)
        return
    from pyarrow.fs import FileSystem

    with contextlib.suppress(OSError):
        files, path = FileSystem.from_uri(storage)
        files.delete_dir(path)


def _run_one(
    train: Callable[[Spec, Worker, Report], Outcome],
    spec: Spec,
    index: int,
    board: Any,
    *,
    workers: int,
    gpu: bool,
    threads: int,
    storage: Path | str,
    retries: int,
    stop: threading.Event,
    placement: str,
    placement_timeout_seconds: float,
    fewer: Sequence[int],
    watch: Watch | None,
    furthest: Sequence[float],
) -> Outcome | Failed:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from harness.cluster.loopback import LoopbackConfig

    class Relay(ray.train.UserCallback):
        """Runs in Ray Train's controller, whose errors would end the run: so it raises none."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            with contextlib.suppress(Exception):
                board.put.remote(index, metrics[0]["event"])

    class QuietTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # needs the dashboard and complains once a second without it; what it does is done in _free below
            kept = super()._create_default_callbacks()
            return [c for c in kept if type(c).__name__ != "PlacementGroupCleanerCallback"]

    alone = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]] == [LOOPBACK]
    make_config = LoopbackConfig if alone else TorchConfig
    bundle = {"CPU": float(threads), **({"GPU": 1.0} if gpu else {})}
    reason, attempt, announced, waited = "", 1, (0, workers), 0.0
    deaths, came = 0, 0.0  # in a row without coming further; how far the attempts before came

    def width() -> int:
        if not fewer:
            return workers
        return choose_width(_look(), (workers, *fewer), threads=threads, gpu=gpu, placement=placement)

    while True:
        seconds, now = _wait_for_room(bundle, width, index, board, stop, waited, placement_timeout_seconds)
        if seconds is None:
            return Failed(exception="", message=f"no room in the cluster for {workers} x {_describe_bundle(bundle)} within "
                          f"{placement_timeout_seconds / 60:.0f} minutes", traceback="", died=True, attempts=attempt)  # fmt: skip
        waited += seconds
        if (attempt, now) != announced:
            if attempt == announced[0]:
                reason = "the cluster has changed before the workers were placed"
            board.put.remote(
                index, Started(attempt=attempt, reason=reason, workers=now if now != workers else None)
            )
            announced = (attempt, now)
        asked_at = time.time()

        def loop(attempt: int = attempt, asked_at: float = asked_at) -> Any:
            from ray.train import get_context
            from ray.train.torch import get_device
            from ray.util import get_current_placement_group

            context = get_context()
            worker = Worker(
                rank=context.get_world_rank(),
                world_size=context.get_world_size(),
                device=str(get_device()),
                threads=threads,
                attempt=attempt,
                launch_seconds=time.time() - asked_at,
            )

            def report(event: Any) -> None:
                # a barrier among the ranks in Ray Train; what the others report is not looked at
                ray.train.report({"event": event if worker.rank == 0 else None})

            if worker.rank == 0:
                board.place.remote(index, get_current_placement_group())
            report(Entered())
            watching = None
            if watch is not None and context.get_local_rank() == 0:
                watching = _start_watching(watch, os.environ.get("CUDA_VISIBLE_DEVICES") if gpu else "")
            outcome = train(spec, worker, report)
            if watching is not None:
                with contextlib.suppress(Exception):  # a figure is missing, the run is not
                    seen = Watched(node=ray.get(watching.stop.remote(), timeout=10))
                    ray.get(board.put.remote(index, seen), timeout=10)
                    ray.kill(watching)
            return outcome

        trainer = QuietTrainer(
            loop,
            torch_config=make_config(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_SECONDS),
            scaling_config=ray.train.ScalingConfig(
                num_workers=now,
                use_gpu=gpu,
                resources_per_worker=bundle,
                placement_strategy=placement.upper().replace("-", "_"),
            ),
            run_config=ray.train.RunConfig(
                # a name used twice would resume the first run of that name
                name=f"run-{index}-{uuid.uuid4().hex[:12]}",
                storage_path=str(storage),
                callbacks=[Relay()],
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            result: Result = trainer.fit()
        except Exception as error:
            _free(board, index)
            failed = make_failed(error, attempts=attempt)
            if failed.exception == "WorkerGroupStartupTimeoutError" and not stop.is_set():
                # room that others were quicker to take, or that lies scattered over nodes
                waited += time.time() - asked_at
                board.put.remote(
                    index, Waiting(seconds=waited, reason=f"no place for {now} x {_describe_bundle(bundle)}")
                )
                continue
            deaths, came = count_failures(deaths, came, furthest[index])
            if not failed.died or deaths > retries or stop.is_set():
                return failed
            reason = failed.message
            attempt += 1
            continue
        outcome: Outcome = result.return_value
        return outcome


def _start_watching(watch: Watch, visible: str | None) -> Any:
    """An actor on this worker's node, owned by it: Ray ends it with the worker. None where it cannot be."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class NodeWatch:
        """A process of its own, so that nothing it does takes time from the step."""

        def __init__(self, watch: Watch, visible: str | None) -> None:
            self.watching = watch(visible)

        def stop(self) -> Any:
            return self.watching.stop()

    with contextlib.suppress(Exception):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(num_cpus=0, scheduling_strategy=here)(NodeWatch).remote(watch, visible)
    return None


def _wait_for_room(
    bundle: dict[str, float],
    width: Callable[[], int],
    index: int,
    board: Any,
    stop: threading.Event,
    waited: float,
    placement_timeout_seconds: float,
) -> tuple[float | None, int]:
    """Wait until the cluster has `width()` bundles free; the seconds that took, None where it took too long, and how
    many bundles.

    Ray Train itself would wait a minute, in silence, and then fail the run.
    """
    import ray

    began = time.monotonic()
    show_at = 3.0
    workers = width()
    while not stop.is_set():
        free = ray.available_resources()
        lacking = [
            f"{need * workers:g} {name} wanted, {free.get(name, 0.0):g} free"
            for name, need in bundle.items()
            if free.get(name, 0.0) < need * workers - 1e-6
        ]
        seconds = time.monotonic() - began
        if (lacking or waited) and waited + seconds > placement_timeout_seconds:
            return None, workers
        if not lacking:
            return seconds, workers
        if seconds >= show_at:
            board.put.remote(index, Waiting(seconds=waited + seconds, reason="; ".join(lacking)))
            show_at = seconds + SHOW_WAIT_SECONDS
        stop.wait(0.2)
        workers = width()
    return None, workers


def _free(board: Any, index: int) -> None:
    """Give back what a failed attempt had: Ray keeps it until the job's end where Ray Train's controller died."""
    import ray
    from ray.util import remove_placement_group

    with contextlib.suppress(Exception):
        group = ray.get(board.displace.remote(index), timeout=30)
        if group is not None:
            remove_placement_group(group)


def _describe_bundle(bundle: dict[str, float]) -> str:
    """ "2 CPU + 1 GPU" """
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def count_failures(deaths: int, came: float, reached: float) -> tuple[int, float]:
    """Deaths in a row, this one too, in which no attempt came further; and how far a run has come by now.

    `deaths` and `came` are what this gave after the attempts before. An attempt that came further has earned the run
    all its retries again; one that dies where another died has not, however many epochs it repeated.
    """
    return (1, reached) if reached > came else (deaths + 1, came)


def make_failed(error: BaseException, *, attempts: int) -> Failed:
    """What went wrong, seen from the worker that raised it rather than from Ray around it."""
    import traceback

    from ray.exceptions import RayError

    failures = [_unwrap(e) for e in getattr(error, "worker_failures", {}).values()]
    # the end of one worker makes the others raise in their collective: its death or its own error is the cause
    cause = min(failures or [_unwrap(getattr(error, "controller_failure", error))],
                key=lambda e: 0 if is_death(e) else 2 if is_lost_peer(e) else 1)  # fmt: skip
    died = is_death(cause) or is_lost_peer(cause)
    text = str(cause).strip() or type(cause).__name__
    if died:
        text = "a worker process died (killed, or its node was lost)"
    elif isinstance(cause, RayError):
        text = text.splitlines()[-1]
    return Failed(
        exception="" if died else type(cause).__name__,
        message=text.splitlines()[0],
        traceback="".join(traceback.format_exception(cause))[-20_000:],
        died=died,
        attempts=attempts,
    )


def _unwrap(error: BaseException) -> BaseException:
    """The exception that was raised in another process."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def is_lost_peer(error: BaseException) -> bool:
    """A collective that ended because another rank is gone, which is noticed before Ray notices a lost node."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    pattern = r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe|gloo.*(timed out|Timed out)"
    return "RuntimeError" in names and re.search(pattern, str(error)) is not None


def is_death(error: BaseException) -> bool:
    """A process or node that ended without an exception of its own."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError", "NodeDiedError",
                         "WorkerGroupStartupFailedError", "WorkerCrashedError"})  # fmt: skip
