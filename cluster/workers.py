"""What runs in the workers of a launched run, and the mailbox through which they and the driver speak."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.cluster.job import (
    Allocation,
    Ended,
    Entered,
    Stalled,
    StartSampler,
    Telemetry,
    Train,
    Worker,
    WorkerDiedError,
    is_of_device,
)  # fmt: skip
from harness.cluster.nodes import find_draining

Item = TypeVar("Item")

LEAVE = "leave"  # in the mailbox: by when runs have to end, all of them or an attempt at one
AT_ONCE = 1.0  # a deadline that is over by every node's clock
FOLLOW_SECONDS = 0.05  # between two looks at what comes next
SHORT_RUN_SECONDS = 300.0  # of a longer one, the start of new workers costs a few percent at most
_stores = itertools.count()
terminated = threading.Event()  # in a worker: it got a SIGTERM


def note_sigterm() -> None:
    """In a worker's main thread: a SIGTERM no longer ends it in mid-step."""
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def leave_by(told: float | None = None) -> float | None:
    """By when this worker has to be gone: at once after a SIGTERM, else when its node is taken away, or as it was told."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    by = AT_ONCE if terminated.is_set() else None, find_draining().get(node), told
    return min(filter(None, by), default=None)


class Mailbox:
    """What the workers of all runs report waits here for the driver; and notes of either for the other."""

    def __init__(self) -> None:
        self.events: list[tuple[int, Any]] = []
        self.notes: dict[Any, Any] = {}

    def put(self, index: int, event: Any, attempt: int | None = None) -> bool:
        """Whether the attempt is the run's last: an earlier one may live on beside it, on a node that seemed lost."""
        current = attempt is None or self.notes.get(("attempt", index), attempt) == attempt
        if current:
            self.events.append((index, event))
            self.notes["ended", index] = isinstance(event, Ended) or self.notes.get(("ended", index))
        return current

    def empty(self) -> list[tuple[int, Any]]:
        events, self.events = self.events, []
        return events

    def note(self, key: Any, value: Any) -> None:
        self.notes[key] = value

    def read(self, *keys: Any) -> Any:
        return next((self.notes[key] for key in keys if key in self.notes), None)

    def follow(self, index: int, following: tuple[int, Any] | None) -> bool:
        """The driver says what the workers of a run that has ended go on with; False where they have ended too."""
        if ("closed", index) in self.notes:
            return False
        self.notes["next", index] = (following,)
        return True

    def close(self, index: int) -> int | None:
        """The workers that began with this run have ended: in which run, None where they were between two. Should one of them
        live on, behind a cut link, it is not heard until the next attempt says its number."""
        while (following := self.notes.get(("next", index), (None,))[0]) is not None:
            index = following[0]
        if not self.notes.get(("ended", index)):
            self.notes["attempt", index] = 0
            return index
        self.notes["closed", index] = True
        return None


def this_node() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def other_nodes(avoid: Collection[str]) -> dict[str, str] | None:
    """Ray's label selector of all nodes but these."""
    return {"ray.io/node-id": f"!in({','.join(avoid)})"} if avoid else None


def make_file_url() -> str:
    """A place for the ranks of one run to meet, where all are in this machine: among Ray's own files, since ranks that are
    killed leave it behind."""
    import ray

    node: Any = ray._private.worker._global_node
    return Path(node.get_session_dir_path(), f"ranks-{uuid.uuid4().hex}").as_uri()


@contextlib.contextmanager
def driver_clock() -> Iterator[Callable[[], float]]:
    """What reads the driver's clock on any node."""
    import ray

    class Clock:
        def now(self) -> float:
            return time.time()

    clock: Any = ray.remote(num_cpus=0, scheduling_strategy=this_node())(Clock).remote()
    yield lambda: float(ray.get(clock.now.remote()))
    ray.kill(clock)


def count_ranks() -> int:
    """Those of the process group; 1 without one. Alone in it, a rank calls no collective: NCCL would set itself up for it."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Item) -> list[Item]:
    """Every rank's value, in order. A collective, after which all ranks have come so far."""
    import torch.distributed as dist

    if count_ranks() == 1:
        return [value]
    every: list[Any] = [None] * count_ranks()
    dist.all_gather_object(every, value)
    return every


def store_of_run(name: str) -> Any:
    """A part of the process group's store that no other run of these workers uses. A collective."""
    from torch.distributed import distributed_c10d

    run = gather(next(_stores))[0]  # of rank 0: other ranks may be younger processes
    return distributed_c10d.PrefixStore(f"{name}-{run}", distributed_c10d._get_default_store())


@dataclass(frozen=True, slots=True)
class Task:
    """What the workers of every run are sent."""

    train: Train
    job: Allocation
    telemetry: StartSampler | None
    mailbox: Any

    def work(self, index: int, spec: Any, attempt: int, started_at: float) -> None:
        """In a worker: a run, and those that the driver has it go on with."""
        import ray

        following: tuple[int, Any] | None = index, spec
        while following is not None:
            index, spec = following
            worker, answer = self.work_once(index, spec, attempt, started_at), list[Any]()
            attempt, started_at = 1, time.time()
            while worker.rank == 0 and not (answer := ray.get(self.mailbox.read.remote(("next", index)))):
                time.sleep(FOLLOW_SECONDS)
            (following,) = gather(answer)[0]

    def work_once(self, index: int, spec: Any, attempt: int, started_at: float) -> Worker:
        """Call the train function and report its outcome; measure this node meanwhile if this is its first worker."""
        import ray
        from ray.train import get_context
        from ray.train.torch import get_device
        from ray.util import get_current_placement_group

        context, job, mailbox = get_context(), self.job, self.mailbox
        node, rank = ray.get_runtime_context().get_node_id(), context.get_world_rank()

        def notice() -> float | None:
            keys = (LEAVE, (LEAVE, index, attempt)) if rank == 0 else ()
            return leave_by(ray.get(mailbox.read.remote(*keys), timeout=10) if keys else None)

        def alarm(stalled: Stalled) -> None:
            with contextlib.suppress(Exception):  # where the driver is out of reach, another rank may reach it
                ray.get(mailbox.note.remote(("stalled", index, attempt), stalled), timeout=10)
            os._exit(1)  # whatever it waits for

        def report(event: Any) -> None:
            # waits for the answer: else a death soon after would lose it
            if rank == 0 and not ray.get(mailbox.put.remote(index, event, attempt)):
                raise WorkerDiedError("another attempt at this run has begun")

        worker = job.worker(
            rank=rank, world_size=context.get_world_size(), device=str(get_device()), attempt=attempt,
            launch_seconds=time.time() - started_at, node=node, notice=notice, alarm=alarm,
        )  # fmt: skip
        if rank == 0:
            mailbox.note.remote(("placement group", index), get_current_placement_group())
        report(Entered())
        sampler, began = None, time.monotonic()
        if self.telemetry is not None and context.get_local_rank() == 0:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") if job.device == "cuda" else ""
            with contextlib.suppress(Exception):  # owned by this worker: Ray ends it with the worker
                remote: Any = ray.remote(num_cpus=0, scheduling_strategy=this_node())(self.telemetry)
                sampler = remote.remote(visible)
        try:
            outcome = self.train(spec, worker, report)
        except Exception as error:
            for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"] if is_of_device(error) else ():
                mailbox.note.remote(("broken", index, attempt), (node, gpu))
            error.add_note("".join(traceback.format_exception(error)))  # Ray leaves the traceback here
            raise
        if sampler is not None:
            with contextlib.suppress(Exception):  # a missing figure does not cost the run
                measured = Telemetry(node=ray.get(sampler.stop.remote(), timeout=10))
                ray.get(mailbox.put.remote(index, measured), timeout=10)
                ray.kill(sampler)
        gather(None)  # what other nodes measured has arrived
        short, whole = time.monotonic() < began + SHORT_RUN_SECONDS, worker.world_size == job.workers
        report(Ended(outcome=outcome, more=short and whole))
        return worker
