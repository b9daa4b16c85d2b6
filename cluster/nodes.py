"""Ask every node of a cluster the same question, before something is trained on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Answer = TypeVar("Answer")

ANSWER_SECONDS = 600.0  # a node may have to decode a data set for the first time


@dataclass(frozen=True, kw_only=True, slots=True)
class Unanswered:
    """A node that gave no answer: it raised, died or took too long."""

    reason: str  # one line


def working_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes that have a CPU or a GPU to work with, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & set(node["Resources"])]


def ask_every_node(
    ask: Callable[[], Answer], *, timeout_seconds: float = ANSWER_SECONDS
) -> dict[str, Answer | Unanswered]:
    """Run `ask` once on each working node; "host (address)" -> what it gave.

    Takes no resource, so it also answers while the cluster is busy. Call `harness.cluster.launch.connect` before.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on_node() -> Answer:
        return ask()

    asked = {}
    task = ray.remote(num_cpus=0, max_retries=0)(on_node)  # takes no partial
    for node in working_nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        asked[name] = task.options(scheduling_strategy=there).remote()
    answers: dict[str, Answer | Unanswered] = {}
    until = time.monotonic() + timeout_seconds
    for name, reference in asked.items():
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
