"""The nodes of a cluster: what they have, how many runs fit, and one question asked of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from harness.cluster.job import Allocation, make_failed

Answer = TypeVar("Answer")

DRAIN_SECONDS = 120.0  # until a node without a deadline is gone: Ray Train's own assumption
HOLD_SECONDS = 60.0  # until a GPU that is to be set aside is free
ANSWER_SECONDS = 600.0  # a node may have to decode a data set for the first time
MOST_LOST = 10  # nodes in a row without progress, until deaths beside them count


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one node has, in whole CPUs and GPUs."""

    cpus: int
    gpus: int


Cluster = tuple[Node, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unanswered:
    """A node that did not answer: it raised, died or took too long."""

    reason: str  # one line


def find_draining() -> dict[str, float]:
    """Nodes that are to be taken away, by Ray's identifier, and when (`time.time`); where Ray does not know: in a while."""
    import ray._private.state as private

    draining: dict[str, int] = private.state.get_draining_nodes()
    return {node: at / 1000 if at else time.time() + DRAIN_SECONDS for node, at in draining.items()}


def find_leaving() -> set[str]:
    """Nodes that are to be taken away or are lost, as far as the cluster answers."""
    import ray

    with suppress(Exception):
        return {*find_draining(), *(node["NodeID"] for node in ray.nodes() if not node["Alive"])}
    return set()


class Patience:
    """Whether another attempt at a run is worth it: `retries` deaths in a row that brought no progress are allowed. They count
    from the last time on that a node was taken away or lost; after MOST_LOST of them it may be the run that ends them."""

    def __init__(self, retries: int) -> None:
        self.retries, self.gone = retries, find_leaving()
        self.deaths, self.lost, self.progress = 0, 0, 0.0

    def ends(self, progress: float) -> bool:
        """After one more death, and so much progress in all: whether it was one too many."""
        gone = find_leaving() - self.gone
        self.gone |= gone  # an answer that fails takes none away
        if progress > self.progress:
            self.deaths, self.lost, self.progress = 0, 0, progress
        excused = bool(gone) and self.lost < MOST_LOST
        self.deaths, self.lost = 0 if excused else self.deaths + 1, self.lost + excused
        return self.deaths > self.retries


def inspect_cluster(avoid: Collection[str] = ()) -> Cluster:
    """The nodes that are alive, as far as Ray has noticed, and not taken away; nor among those to avoid."""
    import ray

    others = {*avoid, *find_draining()}
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in others]
    return tuple(Node(cpus=int(r.get("CPU", 0)), gpus=int(r.get("GPU", 0))) for r in resources)


def find_lacking(job: Allocation, workers: int, avoid: Collection[str] = ()) -> str:
    """What is not free now, on the nodes of `inspect_cluster`, of what so many workers take; nothing where they fit."""
    import ray._private.state as private

    others, free = {*avoid, *find_draining()}, Counter[str]()
    for node, resources in private.state.available_resources_per_node().items():
        free.update(resources if node not in others else {})
    return "; ".join(
        f"{amount * workers:g} {name} wanted, {free[name]:g} free"
        for name, amount in job.resources.items()
        if free[name] < amount * workers - 1e-6
    )


def find_free(avoid: Collection[str] = ()) -> Cluster:
    """What is free now on each node of `inspect_cluster`."""
    import ray._private.state as private

    others, free = {*avoid, *find_draining()}, private.state.available_resources_per_node().items()
    return tuple(
        Node(cpus=int(r.get("CPU", 0)), gpus=int(r.get("GPU", 0))) for node, r in free if node not in others
    )


def hold_gpu(node: str, gpu: str) -> Any:
    """Keep a GPU from whatever is placed later: an actor that has it, as long as it is held. None where another got it."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Holder:
        def gpus(self) -> list[str]:
            return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    holder: Any = ray.remote(num_cpus=0, num_gpus=1, scheduling_strategy=there)(Holder)
    taken, until = list[Any](), time.monotonic() + HOLD_SECONDS
    try:
        while True:  # Ray chooses which one: take one after the other
            taken.append(holder.remote())
            if ray.get(taken[-1].gpus.remote(), timeout=max(0.0, until - time.monotonic())) == [gpu]:
                return taken.pop()
    except (GetTimeoutError, RayError):
        return None
    finally:
        for other in taken:
            ray.kill(other)


def count_runs(cluster: Cluster, job: Allocation) -> int:
    """How many runs of the job's workers an idle cluster could hold."""
    workers = [
        min(int(has[name] / amount + 1e-6) for name, amount in job.resources.items())
        for has in ({"CPU": node.cpus, "GPU": node.gpus} for node in cluster)
    ]
    if job.placement == "strict-pack":
        return sum(count // job.workers for count in workers)
    return sum(workers) // job.workers


def choose_world_size(cluster: Cluster, job: Allocation) -> int:
    """The largest world size of the job of which the cluster can hold a run; the job's own if there is none.

    What other runs use now does not count: a run waits for them, and takes fewer workers only where the cluster itself
    has become too small.
    """
    widths = (job.workers, *job.fallback_world_sizes)
    return next((width for width in widths if count_runs(cluster, replace(job, workers=width))), job.workers)


def fit(cluster: Cluster, job: Allocation) -> Allocation:
    """The job with as many of its concurrent runs as fit, and the most CPUs a worker with which they do.

    No concurrent runs where not one can be placed.
    """
    most = min(job.concurrent_runs, count_runs(cluster, replace(job, threads=1)))
    largest = sum(node.cpus for node in cluster) // (job.workers * most) if most else 1
    widest = (n for n in range(largest, 1, -1) if count_runs(cluster, replace(job, threads=n)) >= most)
    return replace(job, concurrent_runs=most, threads=next(widest, 1))


def working_nodes() -> dict[str, str]:
    """The cluster's nodes that have a CPU or a GPU to work with: "host (address)" -> Ray's identifier."""
    import ray

    working = [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & set(node["Resources"])]
    return {f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": node["NodeID"] for node in working}


def only_this_one() -> bool:
    """Whether no other node works than the one that this process is on."""
    import ray

    return set(working_nodes().values()) <= {ray.get_runtime_context().get_node_id()}


def ask_every_node(
    ask: Callable[[], Answer], *, timeout_seconds: float = ANSWER_SECONDS, only: str | None = None, gpus: int = 0
) -> dict[str, Answer | Unanswered]:
    """Call `ask` once on each working node, or on one alone; its answer by the names of `working_nodes`.

    Takes no resources but `gpus`, so that it also answers while the cluster is busy. Call `connect` before.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # takes no partial; a process that has used a GPU would disturb the runs after it
    task: Any = ray.remote(num_cpus=0, num_gpus=gpus or None, max_retries=0, max_calls=1)(lambda: ask())
    pending = {
        name: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for name, node in working_nodes().items()
        if only in (None, name)
    }
    answers: dict[str, Answer | Unanswered] = {}
    until = time.monotonic() + timeout_seconds
    for name, reference in pending.items():
        try:
            answers[name] = ray.get(reference, timeout=max(0.0, until - time.monotonic()))
        except GetTimeoutError:
            ray.cancel(reference, force=True)
            answers[name] = Unanswered(reason=f"no answer within {timeout_seconds:.0f} seconds")
        except RayError as error:
            failed = make_failed(error, attempts=1)
            answers[name] = Unanswered(reason=f"{failed.exception}: {failed.message}".removeprefix(": "))
    return answers
