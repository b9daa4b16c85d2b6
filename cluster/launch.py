"""Many runs on the GPUs of a Ray cluster: each one a DDP job of Ray Train, several at a time where they fit.

Generic over what is run: `train(spec, worker, report)` is called once in each of a run's workers, inside an
initialised process group (NCCL on GPUs, gloo on CPUs) when there are several. Ray is imported when it is used.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from harness.cluster.connect import ClusterError
from harness.cluster.job import (
    COLLECTIVE_GRACE,
    LOOPBACK,
    WORKER_DIED,
    Allocation,
    Ended,
    Entered,
    Failed,
    Launched,
    PreemptedError,
    Started,
    StartSampler,
    Telemetry,
    Train,
    Waiting,
    make_failed,
)  # fmt: skip
from harness.cluster.nodes import (
    Patience,
    choose_world_size,
    count_runs,
    find_free,
    find_lacking,
    hold_gpu,
    inspect_cluster,
)
from harness.cluster.workers import (
    AT_ONCE,
    LEAVE,
    Mailbox,
    Task,
    make_file_url,
    note_sigterm,
    other_nodes,
    this_node,
)

SHOW_WAIT_AFTER_SECONDS, SHOW_WAIT_EVERY_SECONDS = 3.0, 10.0
LOOK_SECONDS = 1.0  # between looks for nodes that come and go
GIVE_BACK_SECONDS = 30.0  # without room, until GPUs that were set aside are given back; Ray frees others in less
POLL_SECONDS = 0.2  # between two looks at what was reported, or for room, or whether the command ends


def launch(
    train: Train, specs: Sequence[Any], job: Allocation, *, progress: Callable[[Any, Any], None],
    telemetry: StartSampler | None = None, progress_of: Callable[[Any], float] = lambda _: 0.0,
    leaving: Callable[[], bool] = lambda: False, row: Callable[[Any], Any] = id,
) -> Launched:  # fmt: skip
    """Run every spec, `job.concurrent_runs` at a time; yield each as it ends. Call `connect` before.

    A worker that dies (killed, out of host memory, node lost, its GPU broken, which is then set aside) is retried; an
    exception is not, since it would be raised again. `progress_of(event)` measures, from what rank 0 reports, how far a
    run is: `job.retries` deaths in a row that brought no progress are allowed. An attempt that lacks resources, since a
    node was lost or others use the cluster, waits without being counted. `progress(spec, event)` is called in this thread
    with `Started`, `Waiting`, `Entered` and every report of rank 0. `telemetry` is started on each node of an attempt, in
    an actor that ends with it; its measurements come as `Telemetry`.

    Raises ClusterError where Ray itself is lost.

    Workers of a node that Ray drains stop as `Worker.notice` says, and go on elsewhere: that is no death, nor is one when
    nodes are drained or lost. Once `leaving()` holds, all runs stop so, and then KeyboardInterrupt is raised.

    A run that ends within SHORT_RUN_SECONDS, and with as many workers as were asked for, leaves them with their imports and
    their process group to the next spec with an equal `row(spec)`. Another row, and whatever follows a failure, has new ones.
    """
    import ray

    # beside the driver: on another node it would be lost with that node, and every run with it
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=this_node())(Mailbox).remote()
    driver = _Driver(Task(train, job, telemetry, mailbox), specs, list(map(row, specs)))
    for _ in range(min(job.concurrent_runs, len(specs))):
        driver.start(driver.take())
    ended = 0
    try:
        while ended < len(specs):
            time.sleep(POLL_SECONDS)
            left = driver.stop.is_set() and not any(thread.is_alive() for thread in driver.threads)
            if leaving() and not driver.stop.is_set():
                driver.stop.set()
                mailbox.note.remote(LEAVE, AT_ONCE)
            driver.look()
            events = ray.get(mailbox.empty.remote())
            if left and not events:
                raise KeyboardInterrupt
            for index, event in events:
                if isinstance(event, Ended):
                    ended += 1
                    yield specs[index], event.outcome
                    following = driver.take(like=index) if event.more else None
                    if following is not None:
                        progress(specs[following], Started(attempt=1))  # makes its folder
                    driver.go_on(index, following)
                    continue
                driver.best_progress[index] = max(driver.best_progress[index], progress_of(event))
                progress(specs[index], event)
        for thread in driver.threads:
            thread.join()
    except ray.exceptions.RayError as error:  # of the mailbox
        if leaving():  # Ray got the signal, too
            raise KeyboardInterrupt from None
        why = str(error).splitlines()[0]
        raise ClusterError(f"Ray was lost: {why} The same command goes on from the last checkpoints") from error
    finally:
        driver.stop.set()
        driver.over.set()
        for thread in driver.threads:  # if one calls Ray later, Ray ends this process, with 1
            thread.join()
        ray.kill(mailbox)


def launch_here(
    train: Train, specs: Sequence[Any], job: Allocation, *, progress: Callable[[Any, Any], None],
    telemetry: StartSampler | None = None, leaving: Callable[[], bool] = lambda: False, **of_ray: Any,
) -> Launched:  # fmt: skip
    """As `launch`, but in this process, one run after another, and without Ray. Raises ValueError for several workers."""
    if job.workers != 1:
        raise ValueError(f"the local launcher runs one worker, not {job.workers}: use --launcher ray")
    worker = job.worker(notice=lambda: time.time() if leaving() else None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if job.device == "cuda" else ""
    for spec in specs:
        progress(spec, Started(attempt=1))
        progress(spec, Entered())
        sampler = None
        with contextlib.suppress(Exception):
            sampler = telemetry and telemetry(visible)
        try:
            outcome = train(spec, worker, partial(progress, spec))
        except PreemptedError:
            raise KeyboardInterrupt from None
        except Exception as error:
            outcome = make_failed(error, attempts=1)
        finally:
            if sampler is not None:
                with contextlib.suppress(Exception):
                    progress(spec, Telemetry(node=sampler.stop()))
        yield spec, outcome


def _loopback_config(**options: Any) -> Any:
    """A TorchConfig of ranks that are all in this machine: they find each other by a file. torch's own store of keys listens
    on every address of a machine, and has no word for another; Ray Train knows "env" and "tcp"."""
    import ray
    from ray.train.torch import TorchConfig, config

    class Backend(config._TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:  # in Ray Train's controller
            worker_group.execute(config._set_torch_distributed_env_vars)
            every = {**options, "world_size": len(worker_group), "init_method": make_file_url()}
            call = partial(worker_group.execute_single_async, fn=config._setup_torch_process_group, **every)
            ray.get([call(rank, world_rank=rank) for rank in range(len(worker_group))])

    class LoopbackConfig(TorchConfig):
        backend_cls = Backend

    return LoopbackConfig(**options)


class _Driver:
    """What the threads of a launch share; each sees to one run at a time and then takes the next."""

    def __init__(self, task: Task, specs: Sequence[Any], rows: Sequence[Any] = ()) -> None:
        self.task, self.specs, self.job, self.mailbox = task, specs, task.job, task.mailbox
        self.rows = rows
        self.waiting, self.lock = list(range(len(specs))), threading.Lock()
        self.threads: list[threading.Thread] = []
        self.stop, self.over = threading.Event(), threading.Event()  # no further attempts; nor is any waited for
        self.best_progress = [0.0] * len(specs)  # of each run, as it was reported
        self.training = dict[tuple[int, int], int]()  # run and attempt -> workers
        self.looked_at = float("-inf")
        # by run: what keeps GPUs on which it failed from all others
        self.held, self.holding = defaultdict[int, list[Any]](list), threading.Lock()

    def take(self, like: int | None = None) -> int | None:
        """The next run, or the next of that row; None where there is none, or the command has to end."""
        with self.lock:
            waiting = [] if self.stop.is_set() else self.waiting
            found = next((i for i in waiting if like is None or self.rows[i] == self.rows[like]), None)
            if found is not None:
                waiting.remove(found)
            return found

    def start(self, *place: int | None) -> None:
        """See to a run, from its first attempt on or a later one, and to others after it."""
        self.threads.append(threading.Thread(target=self._serve, args=place, daemon=True))
        self.threads[-1].start()

    def _serve(self, index: int | None, attempt: int = 1) -> None:
        while index is not None:
            run = _Run(self, index, attempt)
            try:
                failed = run.run()
            except BaseException as error:
                failed = make_failed(error, attempts=1)
            if failed is not None and not self.stop.is_set():  # then Ray ends with the command, or has ended
                run.put(Ended(outcome=failed))
            index, attempt = self.take(), 1

    def go_on(self, index: int, following: int | None) -> None:
        """The workers of a run that has ended get another one, or end."""
        import ray

        after = None if following is None else (following, self.specs[following])
        if not ray.get(self.mailbox.follow.remote(index, after)) and following is not None:
            self.start(following, 2)  # they have ended meanwhile

    def set_aside(self, index: int, node: str, gpu: str) -> None:
        """Keep a run's GPU that seems broken from later attempts, as long as others have room for a run."""
        with self.holding:
            held = sum(map(len, self.held.values())) + 1  # each may cost the room of one run
            room = self.job.runs_per_gpu == 1 and count_runs(inspect_cluster(self.job.avoid), self.job) > held
            if room and (holder := hold_gpu(node, gpu)) is not None:
                self.held[index].append(holder)

    def look(self) -> None:
        """Now and then: for room for runs that have fewer workers than they could."""
        if (now := time.monotonic()) < self.looked_at + LOOK_SECONDS:
            return
        self.looked_at, job = now, self.job
        with contextlib.suppress(Exception):  # Ray's head may be away for a while
            for (index, attempt), workers in list(self.training.items()):
                wider = choose_world_size(inspect_cluster(job.avoid), job) if workers < job.workers else workers
                more = replace(job, workers=max(1, wider - workers))
                if wider > workers and count_runs(find_free(job.avoid), more):
                    self.mailbox.note.remote((LEAVE, index, attempt), math.inf)  # at the epoch's end
                    self.training[index, attempt] = job.workers  # it is told once


class _Run:
    """All attempts at one run, and at those that its workers went on with, in a thread of the driver."""

    def __init__(self, driver: _Driver, index: int, attempt: int = 1) -> None:
        self.driver, self.job, self.mailbox = driver, driver.job, driver.mailbox
        self.index, self.attempt = index, attempt
        self.reason = WORKER_DIED * (attempt > 1)  # of the attempt
        self.waited_seconds = 0.0
        self.patience = Patience(self.job.retries)
        self.announced: tuple[int, int] | None = None  # attempt, world size
        self.avoid = driver.job.avoid  # and nodes on which the last attempt hung, if there is room without them

    def run(self) -> Failed | None:
        """Try until there is no more use in trying, and why. None where all outcomes were reported, or the command has to
        end before."""
        import ray
        from ray.util import remove_placement_group

        job, driver = self.job, self.driver
        while (world_size := self._wait_for_resources()) is not None:
            if self.announced != (self.attempt, world_size):
                self.announced = self.attempt, world_size
                smaller = world_size if world_size != job.workers else None
                self.put(Started(attempt=self.attempt, reason=self.reason, world_size=smaller))
            self.mailbox.note.remote(("attempt", self.index), self.attempt)
            driver.training[attempt := (self.index, self.attempt)] = world_size
            began = time.monotonic()
            try:
                self._make_trainer(world_size).fit()
                return None
            except Exception as error:
                if driver.stop.is_set():  # Ray ends with the command, and may have ended
                    return None
                failed = make_failed(error, attempts=self.attempt)
            finally:
                del driver.training[attempt]
            with contextlib.suppress(Exception):  # Ray keeps it until the end if Ray Train's controller died
                remove_placement_group(self._read(("placement group", self.index)))
            ended_in = ray.get(self.mailbox.close.remote(self.index))
            if ended_in is None:  # its outcome was reported
                return None
            if ended_in != self.index:
                self.index, self.attempt, self.announced = ended_in, 1, None
                self.patience, self.waited_seconds = Patience(job.retries), 0.0
            if failed.exception == "WorkerGroupStartupTimeoutError":
                # others were quicker to take the room, or it is scattered over nodes
                self.waited_seconds += time.monotonic() - began
                self.put(Waiting(seconds=self.waited_seconds, reason=f"no place for {self._describe(world_size)}"))
                continue
            self.waited_seconds = 0.0
            if (final := self._judge(replace(failed, attempts=self.attempt))) is not None:
                return final
        minutes = job.placement_timeout_seconds / 60
        message = f"no room in the cluster for {self._describe(job.workers)} within {minutes:.0f} minutes"
        return Failed(exception="", message=message, traceback="", died=True, attempts=self.attempt)

    def _judge(self, failed: Failed) -> Failed | None:
        """None where there is to be another attempt, else what the run has come to."""
        if stalled := self._read(("stalled", self.index, self.attempt)):
            failed = replace(failed, exception="", died=True, message=stalled.message)
        broken = self._read(("broken", self.index, self.attempt))
        self.avoid = (*self.job.avoid, *(stalled.nodes if stalled else ()))
        ends = not failed.preempted and self.patience.ends(self.driver.best_progress[self.index])
        if ends or not (failed.preempted or failed.died or broken):
            if broken:  # on other GPUs, too
                self.driver.held.pop(self.index, None)
            return failed
        if broken:
            self.driver.set_aside(self.index, *broken)
        grows = failed.preempted and self._read((LEAVE, self.index, self.attempt))
        self.reason = f"room for more workers: {failed.message}" if grows else failed.reason
        self.attempt += 1
        return None

    def put(self, event: Any) -> None:
        self.mailbox.put.remote(self.index, event)

    def _read(self, key: Any) -> Any:
        import ray

        with contextlib.suppress(Exception):
            return ray.get(self.mailbox.read.remote(key), timeout=30)

    def _describe(self, workers: int) -> str:
        return f"{workers} x " + " + ".join(f"{amount:g} {name}" for name, amount in self.job.resources.items())

    def _wait_for_resources(self) -> int | None:
        """Wait until the cluster has a run's resources free; with how many workers, None where that took too long or the
        command has to end. Ray Train itself would wait a minute, in silence, and then fail the run.

        While others of the command's runs train, no time is too long: room comes when they end."""
        job, before, began = self.job, self.waited_seconds, time.monotonic()
        vain_since = began - before
        show_at = SHOW_WAIT_AFTER_SECONDS
        while not self.driver.stop.is_set():
            if self.avoid != job.avoid and not count_runs(inspect_cluster(self.avoid), job):
                self.avoid = job.avoid
            elastic = bool(job.fallback_world_sizes)
            world_size = choose_world_size(inspect_cluster(self.avoid), job) if elastic else job.workers
            lacking = find_lacking(job, world_size, self.avoid)
            seconds = time.monotonic() - began
            self.waited_seconds = before + seconds
            if self.driver.training:
                vain_since = time.monotonic()
            elif lacking and time.monotonic() - vain_since > GIVE_BACK_SECONDS:
                self.driver.held.clear()  # a GPU that may be broken is better than none
            if (lacking or before) and time.monotonic() - vain_since > job.placement_timeout_seconds:
                return None
            if not lacking:
                return world_size
            if seconds >= show_at:
                self.put(Waiting(seconds=self.waited_seconds, reason=lacking))
                show_at = seconds + SHOW_WAIT_EVERY_SECONDS
            self.driver.stop.wait(POLL_SECONDS)
        return None

    def _make_trainer(self, world_size: int) -> Any:
        import ray.train
        from fsspec.implementations.memory import MemoryFileSystem
        from pyarrow.fs import FSSpecHandler, PyFileSystem
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2._internal.constants import get_env_vars_to_propagate
        from ray.train.v2._internal.execution.callback import WorkerCallback
        from ray.train.v2._internal.execution.controller import TrainController

        job, task, over, started_at = self.job, self.driver.task, self.driver.over, time.time()
        index, spec, attempt = self.index, self.driver.specs[self.index], self.attempt

        class OnStart(WorkerCallback):
            def after_init_train_context(self) -> None:  # in each worker's main thread
                note_sigterm()

        class QuietTrainer(TorchTrainer):
            def _initialize_and_run_controller(self, callbacks: Any, **what: Any) -> Any:
                # one needs the dashboard and complains once a second without; `run` does its work
                kept = [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]
                env = {"env_vars": get_env_vars_to_propagate()}
                make: Any = ray.remote(num_cpus=0, scheduling_strategy=this_node(), runtime_env=env)(
                    TrainController
                )
                controller = make.remote(callbacks=[OnStart(), *kept], **what)
                ended = controller.run.remote()
                while not ray.wait([ended], timeout=POLL_SECONDS)[0]:  # Ray's own waits also when the command ends
                    if over.is_set():
                        raise PreemptedError("the command ends")
                ray.get(ended)
                return ray.get(controller.get_result.remote())

        alone = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]] == [LOOPBACK]
        make_config = _loopback_config if alone else TorchConfig
        cuda, seconds = job.device == "cuda", int(job.stall_seconds + COLLECTIVE_GRACE)
        return QuietTrainer(
            lambda: task.work(index, spec, attempt, started_at),
            torch_config=make_config(backend="nccl" if cuda else "gloo", timeout_s=seconds),
            scaling_config=ray.train.ScalingConfig(
                num_workers=world_size, use_gpu=cuda, resources_per_worker=job.resources,
                placement_strategy=job.placement.upper().replace("-", "_"), label_selector=other_nodes(self.avoid),
            ),
            run_config=ray.train.RunConfig(
                storage_path="ray", storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),  # it keeps nothing
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )  # fmt: skip
