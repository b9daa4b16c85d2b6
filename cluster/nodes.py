"""The nodes of a cluster: what they have, how many runs fit, and one question asked of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.cluster.job import JobConfig

Answer = TypeVar("Answer")

ANSWER_SECONDS = 600.0  # a node may have to decode a data set for the first time


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Unanswered:
    """A node that did not answer: it raised, died or took too long."""

    reason: str  # one line


def inspect_cluster() -> Cluster:
    """The nodes that are alive, as far as Ray has noticed."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(members=tuple(Node(cpus=int(r.get("CPU", 0)), gpus=int(r.get("GPU", 0))) for r in resources))


def count_runs(cluster: Cluster, world_size: int, resources: Mapping[str, float], placement: str) -> int:
    """How many runs of `world_size` workers with these resources each an idle cluster could hold."""
    workers = [
        min(int(has[name] / amount + 1e-6) for name, amount in resources.items())
        for has in ({"CPU": node.cpus, "GPU": node.gpus} for node in cluster.members)
    ]
    if placement == "strict-pack":
        return sum(count // world_size for count in workers)
    return sum(workers) // world_size


def choose_world_size(cluster: Cluster, job: JobConfig) -> int:
    """The largest world size of the job of which the cluster can hold a run; the job's own if there is none.

    What other runs use now does not count: a run waits for them, and takes fewer workers only where the cluster itself
    has become too small.
    """
    for world_size in (job.world_size, *job.fallback_world_sizes):
        if count_runs(cluster, world_size, job.resources, job.placement):
            return world_size
    return job.world_size


def fit(
    cluster: Cluster, *, world_size: int, concurrent_runs: int, gpus_per_worker: float, placement: str
) -> tuple[int, int]:
    """How many of `concurrent_runs` runs can train at a time, and with how many CPUs a worker.

    The most CPUs that leave the number of runs as it is with one CPU; (0, 0) where not one run can be placed.
    `gpus_per_worker` is 0 for runs without GPUs.
    """
    gpus = {"GPU": gpus_per_worker} if gpus_per_worker else {}

    def runs(threads: int) -> int:
        return min(concurrent_runs, count_runs(cluster, world_size, {"CPU": threads, **gpus}, placement))

    most = runs(1)
    if not most:
        return 0, 0
    threads = 1
    while threads * world_size * most < cluster.cpus and runs(threads + 1) == most:
        threads += 1
    return most, threads


def working_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes that have a CPU or a GPU to work with, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & set(node["Resources"])]


def ask_every_node(
    ask: Callable[[], Answer], *, timeout_seconds: float = ANSWER_SECONDS, only: str | None = None, gpus: int = 0
) -> dict[str, Answer | Unanswered]:
    """Call `ask` once on each working node, or on one alone; "host (address)" -> its answer.

    Takes no resources but `gpus`, so that it also answers while the cluster is busy. Call `connect` before.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on_node() -> Answer:
        return ask()

    task = ray.remote(num_cpus=0, num_gpus=gpus or None, max_retries=0)(on_node)  # takes no partial
    pending = {}
    for node in working_nodes():
        on_this_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        if only in (None, name):
            pending[name] = task.options(scheduling_strategy=on_this_node).remote()
    answers: dict[str, Answer | Unanswered] = {}
    until = time.monotonic() + timeout_seconds
    for name, reference in pending.items():
        try:
            answers[name] = ray.get(reference, timeout=max(0.0, until - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            answers[name] = Unanswered(reason=f"no answer within {timeout_seconds:.0f} seconds")
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            text = str(cause).strip() or type(cause).__name__
            answers[name] = Unanswered(reason=f"{type(cause).__name__}: {text.splitlines()[-1]}")
        except RayError as error:
            text = str(error).strip() or type(error).__name__
            answers[name] = Unanswered(reason=text.splitlines()[0])
    return answers
