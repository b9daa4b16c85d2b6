"""Many runs on the GPUs of a Ray cluster: each one a DDP job of Ray Train, several at a time where they fit.

Generic over what is run: `train(spec, worker, report)` is called once in each of a run's workers, inside an
initialised process group (NCCL on GPUs, gloo on CPUs) when there are several. Ray is imported when it is used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic

from harness.cluster.job import (
    COLLECTIVE_SECONDS,
    LOOPBACK,
    WORKER_DIED,
    Allocation,
    Ended,
    Entered,
    Failed,
    Launched,
    Outcome,
    Spec,
    Started,
    StartSampler,
    Telemetry,
    Train,
    Waiting,
    Worker,
    count_failures,
    make_failed,
)  # fmt: skip
from harness.cluster.nodes import choose_world_size, inspect_cluster

SHOW_WAIT_AFTER_SECONDS, SHOW_WAIT_EVERY_SECONDS = 3.0, 10.0
DRAIN_SECONDS, FOLLOW_SECONDS = 0.2, 0.05  # between two looks: of the driver, of workers between two runs
SHORT_RUN_SECONDS = 300.0  # of a longer one, the start of new workers costs a few percent at most


def launch(
    train: Train[Spec, Outcome], specs: Sequence[Spec], job: Allocation, *, progress: Callable[[Spec, Any], None],
    telemetry: StartSampler | None = None, progress_of: Callable[[Any], float] = lambda _: 0.0,
    row: Callable[[Spec], Any] | None = None,
) -> Launched[Spec, Outcome]:  # fmt: skip
    """Run every spec, `job.concurrent_runs` at a time; yield each as it ends. Call `connect` before.

    A worker that dies (killed, out of host memory, node lost) is retried; an exception is not, since it would be
    raised again. `progress_of(event)` measures, from what rank 0 reports, how far a run is: `job.retries` deaths in a
    row that brought no progress are allowed. An attempt that lacks resources, since a node was lost or others use the
    cluster, waits without being counted. `progress(spec, event)` is called in this thread with `Started`, `Waiting`,
    `Entered` and every report of rank 0. `telemetry` is started on each node of an attempt, in an actor that ends with
    it; its measurements come as `Telemetry`.

    A run that has ended well within SHORT_RUN_SECONDS leaves its workers, with their imports and their process group, to
    the next spec with an equal `row(spec)`. Those of another row have new ones, and so has whatever follows a failure.
    """
    import ray

    # beside the driver: on another node it would be lost with that node, and every run with it
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=_this_node())(Mailbox).remote()
    stop, lock, waiting = threading.Event(), threading.Lock(), list(range(len(specs)))
    rows = [row and row(spec) for spec in specs]
    best_progress, entered_at = [0.0] * len(specs), dict[int, float]()
    threads: list[threading.Thread] = []

    def take(like: int | None = None) -> int | None:
        """The next run, or the next of that row; None where there is none."""
        with lock:
            found = next((index for index in waiting if like is None or rows[index] == rows[like]), None)
            if found is not None:
                waiting.remove(found)
            return found

    def serve(index: int | None, attempt: int = 1) -> None:
        while index is not None and not stop.is_set():
            task = _Task(train, specs[index], index, job, telemetry, mailbox)
            run = _Run(task, specs, stop, best_progress, attempt, WORKER_DIED * (attempt > 1))
            try:
                failed = run.run()
            except BaseException as error:
                failed = make_failed(error, attempts=1)
            if failed is not None:
                mailbox.put.remote(run.task.index, Ended(outcome=failed))
            index, attempt = take(), 1

    def start(*place: int | None) -> None:
        threads.append(threading.Thread(target=serve, args=place, daemon=True))
        threads[-1].start()

    def go_on(index: int) -> None:
        """The workers of a run that has ended get the next one of its row, or end."""
        short = row is not None and time.monotonic() - entered_at[index] < SHORT_RUN_SECONDS
        following = take(like=index) if short else None
        if following is None:
            mailbox.follow.remote(index, None)
            return
        progress(specs[following], Started(attempt=1))
        if not ray.get(mailbox.follow.remote(index, (following, specs[following]))):
            start(following, 2)  # they have ended meanwhile

    for _ in range(min(job.concurrent_runs, len(specs))):
        start(take())
    ended = 0
    try:
        while ended < len(specs):
            time.sleep(DRAIN_SECONDS)
            for index, event in ray.get(mailbox.drain.remote()):
                if isinstance(event, Ended):
                    ended += 1
                    yield specs[index], event.outcome
                    if event.more:
                        go_on(index)
                    continue
                if isinstance(event, Entered):
                    entered_at[index] = time.monotonic()
                best_progress[index] = max(best_progress[index], progress_of(event))
                progress(specs[index], event)
        for thread in threads:  # the last workers take their leave: a thread that calls Ray later ends the process
            thread.join()
    finally:
        stop.set()
        ray.kill(mailbox)
        _remove(job.storage)


def launch_here(
    train: Train[Spec, Outcome], specs: Sequence[Spec], job: Allocation, *, progress: Callable[[Spec, Any], None],
    telemetry: StartSampler | None = None, progress_of: Callable[[Any], float] = lambda _: 0.0,
    row: Callable[[Spec], Any] | None = None,
) -> Launched[Spec, Outcome]:  # fmt: skip
    """As `launch`, but in this process and without Ray: one worker. Raises ValueError for a job of several."""
    if job.workers != 1:
        raise ValueError(f"the local launcher runs one worker, not {job.workers}: use --launcher ray")
    cuda = job.device == "cuda"
    worker = Worker(device="cuda:0" if cuda else "cpu", threads=job.threads, runs_per_gpu=job.runs_per_gpu)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if cuda else ""
    for spec in specs:
        progress(spec, Started(attempt=1))
        progress(spec, Entered())
        sampler = None
        with contextlib.suppress(Exception):
            sampler = telemetry and telemetry(visible)
        try:
            outcome: Outcome | Failed = train(spec, worker, partial(progress, spec))
        except Exception as error:
            outcome = make_failed(error, attempts=1)
        finally:
            if sampler is not None:
                with contextlib.suppress(Exception):
                    progress(spec, Telemetry(node=sampler.stop()))
        yield spec, outcome


def _remove(storage: Path | str) -> None:
    if isinstance(storage, Path):
        shutil.rmtree(storage, ignore_errors=True)
        return
    from pyarrow.fs import FileSystem

    with contextlib.suppress(OSError):
        files, path = FileSystem.from_uri(storage)
        files.delete_dir(path)


class Mailbox:
    """What the workers of all runs report waits here for the driver, and what it has them do next for the workers."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Any]] = []
        self.placement_groups: dict[int, Any] = {}
        self.following: dict[int, tuple[int, Any] | None] = {}  # run -> what its workers go on with
        self.ended, self.closed = set[int](), set[int]()

    def put(self, index: int, event: Any) -> None:
        self.events.append((index, event))
        if isinstance(event, Ended):
            self.ended.add(index)

    def follow(self, index: int, following: tuple[int, Any] | None) -> bool:
        """The driver says what comes after a run that has ended; False where its workers have ended too."""
        if index not in self.closed:
            self.following[index] = following
        return index not in self.closed

    def next_after(self, index: int) -> tuple[tuple[int, Any] | None, ...]:
        """What workers go on with; empty where the driver has not said so yet."""
        return (self.following[index],) if index in self.following else ()

    def close(self, index: int) -> int | None:
        """The workers that began with this run have ended: in which run, None where they were between two."""
        while (following := self.following.get(index)) is not None:
            index = following[0]
        if index not in self.ended:
            return index
        self.closed.add(index)
        return None

    def drain(self) -> list[tuple[int, Any]]:
        events, self.events = self.events, []
        return events

    def put_placement_group(self, index: int, group: Any) -> None:
        self.placement_groups[index] = group

    def take_placement_group(self, index: int) -> Any:
        return self.placement_groups.pop(index, None)


def _this_node() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@dataclass(frozen=True, slots=True)
class _Task(Generic[Spec, Outcome]):
    """A run: what its workers are sent."""

    train: Train[Spec, Outcome]
    spec: Spec
    index: int
    job: Allocation
    telemetry: StartSampler | None
    mailbox: Any

    def work(self, attempt: int, started_at: float) -> None:
        """In a worker: this run, and those that the driver has it go on with."""
        task: _Task[Spec, Outcome] | None = self
        while task is not None:
            worker = task.work_once(attempt, started_at)
            attempt, started_at = 1, time.time()
            task = task.next_task(worker)

    def next_task(self, worker: Worker) -> _Task[Spec, Outcome] | None:
        """In a worker whose run has ended: the next one, None where there is none. A collective."""
        import ray

        answer: tuple[Any, ...] = ()
        while worker.rank == 0 and not (answer := ray.get(self.mailbox.next_after.remote(self.index))):
            time.sleep(FOLLOW_SECONDS)
        if worker.world_size > 1:
            from harness.cluster.loopback import from_rank_0

            answer = from_rank_0(answer, worker.device)
        (following,) = answer
        return following and replace(self, index=following[0], spec=following[1])

    def work_once(self, attempt: int, started_at: float) -> Worker:
        """Call the train function and report its outcome; measure this node meanwhile if this is its first worker."""
        import ray
        from ray.train import get_context
        from ray.train.torch import get_device
        from ray.util import get_current_placement_group

        context, job = get_context(), self.job
        worker = Worker(
            rank=context.get_world_rank(), world_size=context.get_world_size(), device=str(get_device()),
            threads=job.threads, attempt=attempt, launch_seconds=time.time() - started_at,
            runs_per_gpu=job.runs_per_gpu,
        )  # fmt: skip

        def report(event: Any) -> None:
            if worker.rank == 0:
                ray.get(self.mailbox.put.remote(self.index, event))  # else a death soon after would lose it

        if worker.rank == 0:
            self.mailbox.put_placement_group.remote(self.index, get_current_placement_group())
        report(Entered())
        sampler = None
        if self.telemetry is not None and context.get_local_rank() == 0:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") if job.device == "cuda" else ""
            with contextlib.suppress(Exception):  # owned by this worker: Ray ends it with the worker
                remote: Any = ray.remote(num_cpus=0, scheduling_strategy=_this_node())(self.telemetry)
                sampler = remote.remote(visible)
        outcome = self.train(self.spec, worker, report)
        if sampler is not None:
            with contextlib.suppress(Exception):  # a missing figure does not cost the run
                measured = Telemetry(node=ray.get(sampler.stop.remote(), timeout=10))
                ray.get(self.mailbox.put.remote(self.index, measured), timeout=10)
                ray.kill(sampler)
        if worker.world_size > 1:
            from harness.cluster.loopback import meet

            meet(worker.device)  # what other nodes measured has arrived
        report(Ended(outcome=outcome, more=worker.world_size == job.workers))
        return worker


@dataclass(slots=True)
class _Run(Generic[Spec, Outcome]):
    """All attempts at one task, and at those that its workers went on with, in a thread of the driver."""

    task: _Task[Spec, Outcome]
    specs: Sequence[Spec]
    stop: threading.Event
    best_progress: Sequence[float]  # of all runs, as the driver has seen them
    attempt: int = 1
    reason: str = ""  # of the attempt
    waited_seconds: float = 0.0
    failures: int = 0  # deaths in a row without progress
    progress: float = 0.0  # before the last death
    announced: tuple[int, int] | None = None  # attempt, world size

    def run(self) -> Failed | None:
        """Try until there is no more use in trying, and why; None where all outcomes were reported."""
        job = self.task.job
        while True:
            world_size = self._wait_for_resources()
            if world_size is None:
                minutes = job.placement_timeout_seconds / 60
                message = f"no room in the cluster for {self._describe(job.workers)} within {minutes:.0f} minutes"
                return Failed(exception="", message=message, traceback="", died=True, attempts=self.attempt)
            self._announce(world_size)
            started_at = time.time()
            try:
                self._make_trainer(world_size, started_at).fit()
                return None
            except Exception as error:
                self._free_placement_group()
                if not self._find_place():
                    return None
                failed = make_failed(error, attempts=self.attempt)
            if failed.exception == "WorkerGroupStartupTimeoutError" and not self.stop.is_set():
                # others were quicker to take the room, or it is scattered over nodes
                self.waited_seconds += time.time() - started_at
                self._put(
                    Waiting(seconds=self.waited_seconds, reason=f"no place for {self._describe(world_size)}")
                )
                continue
            best = self.best_progress[self.task.index]
            self.failures, self.progress = count_failures(self.failures, self.progress, best)
            if not failed.died or self.failures > job.retries or self.stop.is_set():
                return failed
            self.reason = failed.message
            self.attempt += 1

    def _find_place(self) -> bool:
        """Turn to the run in which the workers ended; False where they had reported its outcome."""
        import ray

        index = ray.get(self.task.mailbox.close.remote(self.task.index))
        if index not in (None, self.task.index):
            self.task = replace(self.task, index=index, spec=self.specs[index])
            self.attempt, self.failures, self.progress, self.announced = 1, 0, 0.0, None
        return index is not None

    def _put(self, event: Any) -> None:
        self.task.mailbox.put.remote(self.task.index, event)

    def _describe(self, workers: int) -> str:
        return f"{workers} x " + " + ".join(
            f"{amount:g} {name}" for name, amount in self.task.job.resources.items()
        )

    def _announce(self, world_size: int) -> None:
        if (self.attempt, world_size) != self.announced:
            smaller = world_size if world_size != self.task.job.workers else None
            self._put(Started(attempt=self.attempt, reason=self.reason, world_size=smaller))
            self.announced = (self.attempt, world_size)

    def _wait_for_resources(self) -> int | None:
        """Wait until the cluster has a run's resources free; with how many workers, None where that took too long.

        Ray Train itself would wait a minute, in silence, and then fail the run.
        """
        import ray

        job, before, began = self.task.job, self.waited_seconds, time.monotonic()
        show_at = SHOW_WAIT_AFTER_SECONDS
        while not self.stop.is_set():
            world_size = choose_world_size(inspect_cluster(), job) if job.fallback_world_sizes else job.workers
            free = ray.available_resources()
            lacking = [
                f"{amount * world_size:g} {name} wanted, {free.get(name, 0.0):g} free"
                for name, amount in job.resources.items()
                if free.get(name, 0.0) < amount * world_size - 1e-6
            ]
            seconds = time.monotonic() - began
            self.waited_seconds = before + seconds
            if (lacking or before) and self.waited_seconds > job.placement_timeout_seconds:
                return None
            if not lacking:
                return world_size
            if seconds >= show_at:
                self._put(Waiting(seconds=self.waited_seconds, reason="; ".join(lacking)))
                show_at = seconds + SHOW_WAIT_EVERY_SECONDS
            self.stop.wait(0.2)
        return None

    def _free_placement_group(self) -> None:
        """Give a failed attempt's resources back: Ray keeps them until the job's end if Ray Train's controller died."""
        import ray
        from ray.util import remove_placement_group

        with contextlib.suppress(Exception):
            group = ray.get(self.task.mailbox.take_placement_group.remote(self.task.index), timeout=30)
            if group is not None:
                remove_placement_group(group)

    def _make_trainer(self, world_size: int, started_at: float) -> Any:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        from harness.cluster.loopback import LoopbackConfig

        task, job, attempt = self.task, self.task.job, self.attempt

        class QuietTrainer(TorchTrainer):
            def _create_default_callbacks(self) -> list[Any]:
                # it needs the dashboard and complains once a second without; `_free_placement_group` does its work
                kept = super()._create_default_callbacks()
                return [c for c in kept if type(c).__name__ != "PlacementGroupCleanerCallback"]

        alone = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]] == [LOOPBACK]
        make_config = LoopbackConfig if alone else TorchConfig
        cuda = job.device == "cuda"
        return QuietTrainer(
            lambda: task.work(attempt, started_at),
            torch_config=make_config(backend="nccl" if cuda else "gloo", timeout_s=COLLECTIVE_SECONDS),
            scaling_config=ray.train.ScalingConfig(
                num_workers=world_size, use_gpu=cuda, resources_per_worker=job.resources,
                placement_strategy=job.placement.upper().replace("-", "_"),
            ),
            run_config=ray.train.RunConfig(
                # a name used twice would resume the first run of that name
                name=f"run-{task.index}-{uuid.uuid4().hex[:12]}", storage_path=str(job.storage),
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )  # fmt: skip
