"""What a launcher is given and what it reports: where runs are placed, a worker's place, progress events, failures.

No Ray here: whoever only needs these values does not pay for its import.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Report = Callable[[Any], None]

LOOPBACK = "127.0.0.1"
STALL_SECONDS = 300.0  # without a step: by then a watchdog has seen which rank hangs
COLLECTIVE_GRACE = 60.0  # so much later collectives end by themselves, and name nobody
COLLECTIVE_SECONDS = int(STALL_SECONDS + COLLECTIVE_GRACE)

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
    placement: Placement = "pack"  # prefers one node for a run's workers; strict-pack insists, spread prefers many
    fallback_world_sizes: tuple[int, ...] = ()  # largest first: for a cluster that has become too small
    avoid: tuple[str, ...] = ()  # nodes that are left out, by the launcher's identifiers
    storage: Path = Path()  # for the files of Ray Tune, a folder
    retries: int = 2  # after deaths in a row that brought no progress
    stall_seconds: float = STALL_SECONDS
    placement_timeout_seconds: float = 1800.0  # as long as a cloud may take to bring another node

    def worker(self, device: str = "", **place: Any) -> Worker:
        """One of a run's workers; on its process's first GPU, if on any and on no other."""
        return Worker(
            device=device or ("cuda:0" if self.device == "cuda" else "cpu"), threads=self.threads,
            runs_per_gpu=self.runs_per_gpu, concurrent_runs=self.concurrent_runs,
            stall_seconds=self.stall_seconds, **place,
        )  # fmt: skip

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
    concurrent_runs: int = 1  # of the command
    stall_seconds: float = STALL_SECONDS
    node: str = ""  # as the launcher names it
    notice: Callable[[], float | None] | None = None
    """Asked about once a second, in a thread: by when (`time.time`) this worker has to be gone, None where it may stay.
    All ranks then stop before the same step, and raise PreemptedError. None: nobody can ask it to leave."""
    alarm: Callable[[Stalled], None] | None = None
    """Given who hangs, in a thread; it ends the process. None: RankStalledError is raised where the run trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalled:
    """No step for `stall_seconds`: who hangs, in one line, and the nodes to keep away from in the next attempt."""

    message: str
    nodes: tuple[str, ...] = ()


class PreemptedError(RuntimeError):
    """All ranks have stopped before the same step, as they were asked to, and can go on from there. The message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A run without a result. `died`: a process ended without an exception of its own."""

    exception: str  # type name, "" for a death
    message: str
    traceback: str
    died: bool
    attempts: int = 1

    @property
    def preempted(self) -> bool:
        """Whether its workers have stopped as they were asked to: it can go on."""
        return self.exception == PreemptedError.__name__

    @property
    def reason(self) -> str:
        """Why there is another attempt."""
        return "a worker had to leave: " * self.preempted + self.message


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
class Ended:
    """What a run came to. `more`: its workers can have another one of its row."""

    outcome: Any
    more: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Progress: an attempt cannot begin, the cluster lacks resources now."""

    seconds: float  # so far
    reason: str  # "2 GPU wanted, 1 free"


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """Progress: an attempt ended well; what was measured on one of its nodes."""

    node: Any


Train = Callable[[Any, Worker, Report], Any]  # (spec, worker, report) -> outcome
Launched = Generator[tuple[Any, Any], None, None]  # (spec, its outcome or Failed)
StartSampler = Callable[[str | None], Any]
"""A class that measures the node it is made on, in a process of its own; its `stop()` ends that and returns the
measurements. The argument is CUDA_VISIBLE_DEVICES of a run's workers there: "" for a run without GPUs, None for all."""


# --- what went wrong with a run, and whether another attempt is worth it ---

WORKER_DIED = "a worker process died (killed, or its node was lost)"
_DEATHS = {
    "WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError", "NodeDiedError", "WorkerGroupStartupFailedError",
    "WorkerCrashedError", "WorkerDiedError",
}  # fmt: skip
# of what a GPU says
_OF_PROGRAM = re.compile(
    "out of memory|device-side assert|captur|no kernel image|invalid|not supported|insufficient"
)
_OF_DALI = re.compile("CUDA (?:runtime|driver) API error.*", re.DOTALL)
_COLLECTIVES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_PEER = re.compile(r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe|gloo.*[Tt]imed out")


class WorkerDiedError(RuntimeError):
    """Another process of the same run ended without an exception of its own."""


def make_failed(error: BaseException, *, attempts: int) -> Failed:
    """The failure as the worker that raised it saw it, not as Ray wraps it."""
    wrapped = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    inner = [(each, getattr(each, "cause", None)) for each in wrapped]
    failures = [cause if isinstance(cause, BaseException) else each for each, cause in inner]
    cause = min(failures, key=_precedence)  # when one worker ends, the others raise in their collective
    died = _precedence(cause) in (1, 3)
    text = str(cause).strip() or type(cause).__name__
    text = text.partition("\nencountered:\n")[2].strip() or text  # DALI says before it only where
    if died:  # a watchdog knows which rank it was, and where
        known = {"RankStalledError", "WorkerDiedError"}
        text = next((str(error) for error in failures if known & _names(error)), WORKER_DIED)
    elif "RayError" in _names(cause):
        text = text.splitlines()[-1]
    return Failed(
        exception="" if died else type(cause).__name__, message=text.splitlines()[0],
        traceback="".join(traceback.format_exception(cause))[-20_000:], died=died, attempts=attempts,
    )  # fmt: skip


def is_of_device(error: BaseException) -> bool:
    """Whether it may be the GPU that is broken, and not the program: another one may do. Torch says it in its first line, whose
    last one may speak of assertions; DALI after its own words."""
    text = str(error)
    said = [text.partition("\n")[0]] if "AcceleratorError" in _names(error) else _OF_DALI.findall(text)
    return bool(said) and not _OF_PROGRAM.search(said[0])


def _precedence(error: BaseException) -> int:
    """Of what the ranks of a run raise, the lowest is the cause. 0: preempted, as all were, and the checkpoint is written.
    1: a process or node ended without an exception of its own. 2: any other exception. 3: a collective ended because
    another rank is gone, which is noticed before Ray notices a lost node."""
    names = _names(error)
    if isinstance(error, PreemptedError):
        return 0
    if names & _DEATHS:
        return 1
    return 3 if names & _COLLECTIVES or ("RuntimeError" in names and _LOST_PEER.search(str(error))) else 2


def _names(error: BaseException) -> set[str]:
    """Of its class and those that it is derived from: Ray's and torch's are not imported here."""
    return {cls.__name__ for cls in type(error).__mro__}
