"""Trials of a search by Ray Tune: proposed one after another, judged after every report, pruned early or not.

One Tune trial is one DDP run: rank 0 is Tune's own actor, the other ranks are actors in the rest of the trial's
placement group, so that nothing can outlive a trial. Tune gives concurrent_runs, actors that serve many trials, placement and
retries. What to try and whom to stop is the study's business, and so is remembering it: Tune's own state is thrown
away, and a search whose driver was killed goes on from what its study has written down.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.cluster.failures import WORKER_DIED, is_death, make_failed
from harness.cluster.job import COLLECTIVE_SECONDS, Failed, Outcome, Report, Spec, Started, Worker

PEER_SECONDS = 10.0  # a rank 0 that hangs after a peer's death ends after this
COMMUNICATION = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")

_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: Tune prints nothing
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the caller's: there is no state to save
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",  # a pruned trial may take this long to give its memory back
    "TUNE_WARN_THRESHOLD_S": "60",
}


Proposed = TypeVar("Proposed", covariant=True)
Found = TypeVar("Found", contravariant=True)


class Study(Protocol[Proposed, Found]):
    """What to try, and whom to stop. Every method is called in the driver's main thread."""

    def propose(self) -> tuple[str, Proposed] | None:
        """The next trial, by a name of its own; None when there are no more. Called when a slot is free."""

    def reported(self, name: str, event: Any) -> bool:
        """Rank 0 of a trial reported (or `Started`: an attempt at it begins). True stops the trial."""

    def ended(self, name: str, outcome: Found | Failed | None) -> None:
        """A trial is over. None: it was pruned."""


def search(
    train: Callable[[Spec, Worker, Report], Outcome],
    study: Study[Spec, Outcome],
    *,
    workers: int,
    concurrent_runs: int,
    gpus: float,
    threads: int,
    storage: Path,
    retries: int = 2,
) -> None:
    """Run all that the study proposes, `concurrent_runs` trials at a time.

    Each trial has `workers` processes with `threads` CPUs and `gpus` GPUs (0, 1, or a share of one). A process that
    dies is retried; an exception is not, since it would come again. In a trial that is pruned, `report` raises
    SystemExit. Call `connect` before, in the main thread. `storage` is for Tune's own files.
    """
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    logging.getLogger("ray.air").setLevel(logging.CRITICAL)
    running: dict[str, str] = {}  # Tune's id -> the study's name
    attempts: dict[str, int] = {}
    raised: list[Exception] = []

    class Proposals(Searcher):
        def suggest(self, trial_id: str) -> Any:
            if len(running) >= concurrent_runs:
                return None
            proposal = study.propose()
            if proposal is None:
                return Searcher.FINISHED
            running[trial_id] = proposal[0]
            return {"spec": proposal[1], "asked_at": time.time()}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    class Judge(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if trial.trial_id not in running:  # Tune repeats the last result when the function has returned
                return str(FIFOScheduler.CONTINUE)
            name = running[trial.trial_id]
            try:
                if "outcome" in result:
                    del running[trial.trial_id]
                    study.ended(name, result["outcome"][0])
                elif study.reported(name, result["event"][0]):
                    del running[trial.trial_id]
                    study.ended(name, None)
                    return str(FIFOScheduler.STOP)
            except Exception as error:  # Tune would raise its traceback as text
                raised.append(error)
                raise
            return str(FIFOScheduler.CONTINUE)

    class Watch(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            if trial.trial_id in running:
                attempt = attempts[trial.trial_id] = attempts.get(trial.trial_id, 0) + 1
                reason = WORKER_DIED if attempt > 1 else ""
                study.reported(running[trial.trial_id], Started(attempt=attempt, reason=reason))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            name = running.pop(trial.trial_id, None)
            if name is not None:
                error = trial.get_pickled_error() or RuntimeError("Ray Tune does not say why")
                study.ended(name, make_failed(error, attempts=attempts.get(trial.trial_id, 1)))

    bundle = {"CPU": threads, **({"GPU": gpus} if gpus else {})}
    trainable = tune.with_resources(
        _make_trial(train, workers=workers, gpus=gpus, threads=threads, storage=storage),
        tune.PlacementGroupFactory([bundle] * workers, strategy="PACK"),
    )
    try:
        tune.run(
            trainable,
            name="search",
            num_samples=-1,  # the study says when there are no more
            search_alg=Proposals(),
            scheduler=Judge(),
            callbacks=[Watch()],
            reuse_actors=True,
            max_failures=retries,
            raise_on_failed_trial=False,
            storage_path=str(storage),
            trial_dirname_creator=lambda trial: trial.trial_id,
            verbose=0,
        )
    except Exception:
        if raised:
            raise raised[0] from None
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _make_trial(
    train: Callable[[Spec, Worker, Report], Outcome], *, workers: int, gpus: float, threads: int, storage: Path
) -> Callable[[dict[str, Any]], None]:
    """The function that Tune calls in its actor, once for each trial that the actor serves."""

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        worker = Worker(
            rank=0, world_size=workers, device="cuda:0" if gpus else "cpu", threads=threads,
            launch_seconds=max(0.0, time.time() - config["asked_at"]),
        )  # fmt: skip

        def report(event: Any) -> None:
            tune.report({"event": (event,)})  # a dictionary would be taken apart

        outcome: Any
        note = storage / f"{tune.get_context().get_trial_id()}.failed"
        if note.exists():
            tune.report({"outcome": (pickle.loads(note.read_bytes()),)})
            return
        try:
            with _peers(train, config["spec"], worker, gpus, note) as wait:
                try:
                    outcome = train(config["spec"], worker, report)
                    wait(None)
                except Exception as error:
                    outcome = make_failed(wait(error) or error, attempts=1)
        except SystemExit as stop:  # from `report`: the frames below hold loaders and tensors
            traceback.clear_frames(stop.__traceback__)
            raise
        finally:
            _clean_up()
        tune.report({"outcome": (outcome,)})

    return trial


@contextlib.contextmanager
def _peers(
    train: Callable[[Spec, Worker, Report], Outcome], spec: Spec, worker: Worker, gpus: float, note: Path
) -> Iterator[Callable[[BaseException | None], BaseException | None]]:
    """Start ranks 1 and up, join them in a process group, and end them.

    Gives a function to call when rank 0 has returned (None) or raised: it waits for the peers, raises where one died,
    and returns the exception that was the cause. `note` is left for the next attempt when rank 0 had to be ended
    because of a peer's exception.
    """
    if worker.world_size == 1:
        yield lambda error: error
        return
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    class Peer:
        def run(self, rank: int, url: str) -> None:
            _join(rank, worker.world_size, url, gpus)
            peer = Worker(
                rank=rank, world_size=worker.world_size, device=worker.device, threads=worker.threads,
                launch_seconds=worker.launch_seconds,
            )  # fmt: skip
            try:
                train(spec, peer, lambda _: None)
            except Exception:
                _clean_up()  # with the group gone, rank 0 fails in its collective at once instead of waiting
                raise

    group = ray.util.get_current_placement_group()
    with socket.socket() as free:
        free.bind(("", 0))
        url = f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
    remote = ray.remote(num_cpus=worker.threads, num_gpus=gpus, max_restarts=0)(Peer)
    peers = [
        remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        ).remote()
        for rank in range(1, worker.world_size)
    ]
    ends = [peer.run.remote(rank, url) for rank, peer in enumerate(peers, 1)]
    over = threading.Event()

    def watch() -> None:
        """A lost peer can leave rank 0 in a collective for minutes: then this process ends, and Tune tries again."""
        pending = list(ends)
        while pending and not over.is_set():
            ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
            try:
                ray.get(ready)
            except Exception as error:
                if not over.wait(PEER_SECONDS):
                    if not is_death(error):
                        note.write_bytes(pickle.dumps(make_failed(error, attempts=1)))
                    os._exit(13)

    def wait(error: BaseException | None) -> BaseException | None:
        found = [] if error is None else [error]
        ready, _ = ray.wait(ends, num_returns=len(ends), timeout=None if error is None else PEER_SECONDS)
        for end in ready:
            try:
                ray.get(end)
            except Exception as raised:
                if is_death(raised):
                    raise
                found.append(getattr(raised, "cause", None) or raised)
        over.set()
        if error is None and found:
            raise found[0]
        # one rank's exception makes the others fail in their collective: it is the cause
        found.sort(key=lambda e: type(e).__name__ in COMMUNICATION)
        return found[0] if found else None

    threading.Thread(target=watch, daemon=True).start()
    try:
        _join(0, worker.world_size, url, gpus)
        yield wait
    finally:
        over.set()
        for peer in peers:
            ray.kill(peer)


def _join(rank: int, world_size: int, url: str, gpus: float) -> None:
    from ray.train.torch.config import _setup_torch_process_group

    _setup_torch_process_group(
        "nccl" if gpus else "gloo", world_rank=rank, world_size=world_size, init_method=url,
        timeout_s=COLLECTIVE_SECONDS,
    )  # fmt: skip


def _clean_up() -> None:
    """Leave the process as it was: no process group, no tensors, no cached GPU memory."""
    import sys

    gc.collect()
    if "torch" in sys.modules:
        from ray.train.torch.config import _shutdown_torch

        _shutdown_torch(destroy_process_group=True)
