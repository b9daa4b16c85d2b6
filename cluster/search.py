"""Trials of a search by Ray Tune: proposed one after another, judged after every report, pruned early or not.

One Tune trial is one DDP run: rank 0 is Tune's own actor, the other ranks are actors in the rest of the trial's
placement group, so that nothing can outlive a trial. Tune provides slots, actors that serve many trials, placement and
retries. What to try and what to prune is the caller's business, and so is remembering it: Tune's own state is thrown
away.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray
from ray import tune
from ray._common.network_utils import build_address
from ray.train._internal.utils import get_address_and_port
from ray.tune.search import Searcher
from ray.tune.trainable.function_trainable import wrap_function
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from harness.cluster.connect import ClusterError
from harness.cluster.job import (
    COLLECTIVE_SECONDS,
    LOOPBACK,
    Allocation,
    Failed,
    PreemptedError,
    Report,
    Started,
    Train,
    Worker,
    WorkerDiedError,
    make_failed,
)
from harness.cluster.nodes import Patience, find_lacking, inspect_cluster
from harness.cluster.workers import gather, leave_by, make_file_url, note_sigterm, other_nodes

SHOW_WAIT_SECONDS = 10.0  # without a trial that trains, until it is said what is waited for
PEER_SECONDS = 10.0  # for the other ranks to end once one has
LEAVE_SECONDS = 10.0  # for the ranks to destroy their process group together


class Trials(Protocol):
    """What to try, and what to prune. Every method is called in the driver's main thread."""

    def propose(self) -> tuple[str, Any] | None:
        """The next trial, by a name of its own; None when there are no more. Called when a slot is free."""

    def reported(self, name: str, event: Any) -> bool:
        """Rank 0 of a trial reported (or `Started`: an attempt at it begins). True prunes the trial."""

    def ended(self, name: str, outcome: Any) -> None:
        """A trial is over: its outcome, `Failed`, or None where it was pruned."""

    def waiting(self, seconds: float, reason: str) -> None:
        """No trial trains, for want of room."""


def search(train: Train, trials: Trials, job: Allocation) -> None:
    """Run everything that `trials` proposes, `job.concurrent_runs` at a time.

    A process that dies is retried as by `launch`, and one of a node that Ray drains, or that gets a SIGTERM, leaves as there;
    an exception is not, since it would be raised again. In a trial that is pruned, `report`, which every rank must call
    equally often, raises SystemExit in all of them. Call `connect` before, in the main thread. `job.storage`, a folder,
    is for Tune's own files.
    """

    class Rank0(wrap_function(lambda config: _run_trial(config, train, job))):  # type: ignore[misc]
        def setup(self, config: Any) -> None:  # in its process's main thread
            note_sigterm()
            super().setup(config)

    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    driver = _Driver(trials, job)
    elsewhere = [other_nodes(job.avoid)] * job.workers if job.avoid else None
    placement = tune.PlacementGroupFactory(
        [job.resources] * job.workers, strategy="PACK", bundle_label_selector=elsewhere
    )
    try:
        tune.run(
            Rank0, resources_per_trial=placement,
            num_samples=-1,  # `trials` says when there are no more
            max_concurrent_trials=job.concurrent_runs,  # a slot is free once Tune's actor is, which serves the next trial
            name="search", search_alg=_Proposals(driver), stop=driver.receive, callbacks=[driver], reuse_actors=True,
            max_failures=job.retries, raise_on_failed_trial=False, storage_path=str(job.storage),
            trial_dirname_creator=lambda trial: trial.trial_id, verbose=0,
        )  # fmt: skip
    except Exception:
        if driver.raised:
            raise driver.raised[0] from None
        raise
    finally:
        shutil.rmtree(job.storage, ignore_errors=True)
    for trial_id in list(driver.running):
        driver.end(trial_id, make_failed(RuntimeError("Ray Tune ended without its outcome"), attempts=1))


# --- in the driver ---


@dataclass
class _Running:
    """A trial, and the attempts at it."""

    name: str
    patience: Patience
    trial: Any = None  # Tune's
    attempt: int = 0
    failed: Failed | None = None  # the last attempt
    reports: int = 0  # of this attempt, which begins with those of the epochs before it
    over: bool = False

    def __reduce__(self) -> Any:
        return str, ()  # Tune writes what its trials have

    def fail(self, error: BaseException) -> None:
        """In place of the trial's own way to count its failures: Tune tries again while there are no more than allowed."""
        failed = self.failed = make_failed(error, attempts=self.attempt)
        again = failed.preempted or (failed.died and not self.patience.ends(self.reports))
        self.trial.run_metadata.num_failures, self.trial.max_failures = 1, int(again and not self.over)


class _Driver(tune.Callback):
    """What Tune calls in the driver, handed on to `trials` by their own names."""

    def __init__(self, trials: Trials, job: Allocation) -> None:
        self.trials = trials
        self.running: dict[str, _Running] = {}  # by Tune's id
        self.raised: list[Exception] = []
        self.job, self.trained_at, self.show_at = job, time.monotonic(), 0.0

    def __reduce__(self) -> Any:
        return str, ()  # Tune writes its state, which nobody reads

    def propose(self, trial_id: str) -> Any:
        """As the search algorithm."""
        proposal = self.trials.propose()
        if proposal is None:
            return Searcher.FINISHED
        self.running[trial_id] = _Running(proposal[0], Patience(self.job.retries))
        return {"spec": proposal[1], "proposed_at": time.time()}

    def receive(self, trial_id: str, result: dict[str, Any]) -> bool:
        """As the stopper: take a report or an outcome; True prunes."""
        if (own := self.running.get(trial_id)) is None:
            return False  # Tune repeats the last result when the function has returned
        own.reports += 1
        try:
            if "outcome" in result:
                self.end(trial_id, result["outcome"][0])
            elif self.trials.reported(own.name, result["event"][0]):
                self.end(trial_id, None)
                return True
        except Exception as error:  # Tune would raise its traceback as text
            self.raised.append(error)
            raise
        return False

    def end(self, trial_id: str, outcome: Any) -> None:
        """Of no effect after an outcome."""
        if (own := self.running.pop(trial_id, None)) is not None:
            own.over = True
            try:
                self.trials.ended(own.name, outcome)
            except Exception as error:  # Tune would raise its traceback as text
                self.raised.append(error)
                raise

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """While nothing trains: say what is waited for, and not for ever."""
        now, job = time.monotonic(), self.job
        if any(trial.status == "RUNNING" for trial in trials) or not self.running:
            self.trained_at, self.show_at = now, now + SHOW_WAIT_SECONDS
        elif now >= self.show_at:
            self.show_at, seconds = now + SHOW_WAIT_SECONDS, now - self.trained_at
            lost = None if inspect_cluster() else "Ray was lost: none of its nodes answers"
            lacking = "" if lost else find_lacking(job, job.workers, job.avoid)
            if not lost and seconds > job.placement_timeout_seconds:
                lost = f"no room in the cluster within {seconds / 60:.0f} minutes ({lacking})"
            if lost:
                self.raised.append(ClusterError(lost))
                raise self.raised[0]
            self.trials.waiting(seconds, lacking or "processes are starting")

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if (own := self.running.get(trial.trial_id)) is not None:
            own.trial, own.attempt, own.reports = trial, own.attempt + 1, 0
            trial.handle_error = own.fail
            reason = own.failed.reason if own.failed else ""
            self.trials.reported(own.name, Started(attempt=own.attempt, reason=reason))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        error = WorkerDiedError("its process returned without an outcome")
        self.end(trial.trial_id, make_failed(error, attempts=1))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if (own := self.running.get(trial.trial_id)) is not None:
            error = trial.get_pickled_error() or RuntimeError("Ray Tune gives no reason")
            self.end(trial.trial_id, own.failed or make_failed(error, attempts=1))


class _Proposals(Searcher):
    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.suggest = driver.propose

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...
    def save(self, checkpoint_path: str) -> None: ...


# --- in a trial's processes ---


class Pruned(SystemExit):
    """Raised by `report` in every rank of a pruned trial."""


def _run_trial(config: dict[str, Any], train: Train, job: Allocation) -> None:
    """What Tune calls in its actor, once for each trial that the actor serves: rank 0, which starts the others."""
    launch_seconds = max(0.0, time.time() - config["proposed_at"])
    worker = job.worker(world_size=job.workers, launch_seconds=launch_seconds, notice=leave_by)
    spec = config["spec"]
    with contextlib.closing(_Peers(train, spec, worker, job)) as peers:
        outcome, left = run_rank(train, spec, worker, lambda event: tune.report({"event": (event,)}), peers.url)
        outcome = peers.wait(outcome)
    if not isinstance(outcome, Pruned):
        tune.report({"outcome": (outcome,)})
    if not left:  # this process is of no use to another trial
        os._exit(13)
    if isinstance(outcome, Pruned):
        raise outcome


def run_rank(train: Train, spec: Any, worker: Worker, report: Report, url: str) -> tuple[Any, bool]:
    """Train as one rank, and leave the process without process group, tensors and cached GPU memory if that is possible.

    What the train function's frames hold is freed first: NCCL waits for the CUDA graphs that use its communicator. Then
    all ranks destroy the group together, which NCCL demands.
    """
    result: Any
    try:
        if worker.world_size > 1:
            from ray.train.torch.config import _setup_torch_process_group

            _setup_torch_process_group(
                "gloo" if worker.device == "cpu" else "nccl", world_rank=worker.rank, world_size=worker.world_size,
                init_method=url, timeout_s=COLLECTIVE_SECONDS,
            )  # fmt: skip
        result = train(spec, worker, functools.partial(_report, report, worker))
    except SystemExit as stop:
        _clear_frames(stop)
        result = Pruned(0)
    except Exception as error:
        result = make_failed(error, attempts=1)
        _clear_frames(error)
    return result, leave()


def _report(report: Report, worker: Worker, event: Any) -> None:
    """Report as rank 0; all ranks learn whether the trial is pruned, and none is left in a collective."""
    stop = False
    if worker.rank == 0:
        try:
            report(event)
        except SystemExit:
            stop = True
    if gather(stop)[0]:
        raise Pruned(0)


def _clear_frames(error: BaseException) -> None:
    """Free the local variables of the frames that an exception came through."""
    chain = [error]
    for link in chain:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        chain += [each for each in (link.__cause__, link.__context__) if each is not None and each not in chain]


def leave(seconds: float = LEAVE_SECONDS) -> bool:
    """Destroy the process group and free cached GPU memory; False where that took too long, as when a rank is gone."""
    gc.collect()
    if "torch" not in sys.modules:
        return True
    from ray.train.torch.config import _shutdown_torch

    thread = threading.Thread(target=_shutdown_torch, kwargs={"destroy_process_group": True}, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class _Peers:
    """Ranks 1 and up, as rank 0 sees them."""

    def __init__(self, train: Train, spec: Any, worker: Worker, job: Allocation) -> None:
        self.over, self.url = threading.Event(), ""
        self.actors: list[Any] = []
        self.ends: list[Any] = []
        self.failures: list[Failed] = []
        self.thread = threading.Thread(target=self.watch, daemon=True)
        if worker.world_size > 1:

            class Peer:
                def run(self, rank: int, url: str) -> Any:
                    note_sigterm()
                    return run_rank(train, spec, replace(worker, rank=rank), lambda _: None, url)[0]

            group = ray.util.get_current_placement_group()
            address, port = get_address_and_port()
            self.url = make_file_url() if address == LOOPBACK else f"tcp://{build_address(address, port)}"
            cpus, gpus = job.resources["CPU"], job.resources.get("GPU", 0)
            remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Peer)
            for rank in range(1, worker.world_size):
                bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
                self.actors.append(remote.options(scheduling_strategy=bundle).remote())
            self.ends = [actor.run.remote(rank, self.url) for rank, actor in enumerate(self.actors, 1)]
        self.thread.start()

    def watch(self) -> None:
        """A lost peer can leave rank 0 in a collective for minutes: then this process ends, and Tune tries again where another
        attempt may do."""
        pending = self.ends
        while pending:
            (end, *_), pending = ray.wait(pending)
            try:
                result = ray.get(end)
            except Exception as error:
                result = make_failed(error, attempts=1)
            if isinstance(result, Failed):
                self.failures.append(result)
            if self.failures and not self.over.wait(PEER_SECONDS):
                if not any(failed.died or failed.preempted for failed in self.failures):
                    tune.report({"outcome": (self.failures[0],)})
                os._exit(13)

    def wait(self, result: Any) -> Any:
        """The trial's outcome, after rank 0 has returned its own. Raises where a rank died or had to leave, so that Tune tries
        again.

        One rank's exception makes the others fail in their collective: it is the cause.
        """
        own = [result] if isinstance(result, Failed) else []
        self.over.set()
        self.thread.join(PEER_SECONDS if own else COLLECTIVE_SECONDS)
        cause = min(own + self.failures, key=lambda failed: failed.died, default=result)
        if isinstance(cause, Failed) and cause.died:
            raise WorkerDiedError(cause.message)
        if isinstance(cause, Failed) and cause.preempted:
            raise PreemptedError(cause.message)
        return cause

    def close(self) -> None:
        """End their processes."""
        self.over.set()
        for actor in self.actors:
            ray.kill(actor)
