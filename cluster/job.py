"""What a launcher is given and what it reports: where runs are placed, a worker's place, progress events, failures.

No Ray here: whoever only needs these values does not pay for its import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Spec = TypeVar("Spec")
Outcome = TypeVar("Outcome")
Report = Callable[[Any], None]

LOOPBACK = "127.0.0.1"
COLLECTIVE_SECONDS = 300  # a peer that stops without dying is noticed after this, not after torch's 30 minutes

Placement = Literal["pack", "strict-pack", "spread"]
PLACEMENTS: tuple[Placement, ...] = ("pack", "strict-pack", "spread")


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """`concurrent_runs` at a time, each of `workers` ranks with `threads` CPUs; none of it changes what a run computes."""

    device: Literal["cuda", "cpu"]
    workers: int
    concurrent_runs: int
    threads: int
    gpus: int = 0  # of all runs
    runs_per_gpu: int = 1
    placement: Placement = (
        "pack"  # pack prefers one node for a run's workers, strict-pack insists, spread prefers many
    )
    fallback_world_sizes: tuple[int, ...] = ()  # largest first: for a cluster that has become too small
    storage: Path | str = (
        ""  # for Ray's own files; seen by every node: a shared folder, or a URI that pyarrow opens
    )
    retries: int = 2  # after deaths in a row that brought no progress
    placement_timeout_seconds: float = 1800.0  # as long as a cloud may take to bring another node

    @property
    def resources(self) -> dict[str, float]:
        """What a worker takes, as Ray counts it: to four decimals, rounded down so that the shares of a GPU fit."""
        gpus = {"GPU": math.floor(10_000 / self.runs_per_gpu) / 10_000} if self.device == "cuda" else {}
        return {"CPU": float(self.threads), **gpus}


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What one worker of a run knows about its place."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"  # "cuda:0" or "cpu"
    threads: int = 1
    attempt: int = 1
    launch_seconds: float = 0.0  # from the request until the function was entered; by two clocks on two nodes
    runs_per_gpu: int = 1  # above 1, other runs train on this GPU at the same time


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A run without a result. `died`: a process ended without an exception of its own."""

    exception: str  # type name, "" for a death
    message: str
    traceback: str
    died: bool
    attempts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """Progress: an attempt at a run begins; its workers are being placed."""

    attempt: int
    reason: str = ""  # why there is another attempt
    world_size: int | None = None  # where it is smaller than the job's


@dataclass(frozen=True, kw_only=True, slots=True)
class Entered:
    """Progress: the attempt's workers are placed and its train function was entered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Progress: an attempt cannot begin, the cluster lacks resources now."""

    seconds: float  # so far
    reason: str  # "2 GPU wanted, 1 free"


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """Progress: an attempt ended well; what was measured on one of its nodes."""

    node: Any


Train = Callable[[Spec, Worker, Report], Outcome]
Launched = Iterator[tuple[Spec, Outcome | Failed]]
StartSampler = Callable[[str | None], Any]
"""Starts what measures the node it is called on; its `stop()` ends it and returns the measurements. The argument is
CUDA_VISIBLE_DEVICES of a run's workers there: "" for a run without GPUs, None for all of them."""
