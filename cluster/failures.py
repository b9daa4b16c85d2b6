"""What went wrong with a run, and whether another attempt is worth it."""

from __future__ import annotations

import re
import traceback

from harness.cluster.job import Failed

WORKER_DIED = "a worker process died (killed, or its node was lost)"
_DEATHS = {
    "WorkerHealthCheckFailedError", "ActorDiedError", "RayActorError", "NodeDiedError", "WorkerGroupStartupFailedError",
    "WorkerCrashedError", "WorkerDiedError",
}  # fmt: skip
_COLLECTIVES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_PEER = re.compile(
    r"[Cc]onnection (closed by peer|reset by peer|refused)|Broken pipe|gloo.*(timed out|Timed out)"
)


class WorkerDiedError(RuntimeError):
    """Another process of the same run ended without an exception of its own."""


def make_failed(error: BaseException, *, attempts: int) -> Failed:
    """The failure as the worker that raised it saw it, not as Ray wraps it."""
    failures = [_unwrap(e) for e in getattr(error, "worker_failures", {}).values()]
    # when one worker ends, the others raise in their collective: its death or its own error is the cause
    cause = min(
        failures or [_unwrap(getattr(error, "controller_failure", error))],
        key=lambda e: 0 if is_death(e) else 2 if is_lost_peer(e) else 1,
    )
    died = is_death(cause) or is_lost_peer(cause)
    text = str(cause).strip() or type(cause).__name__
    if died:  # a watchdog knows which rank it was, and where
        stalled = [str(error) for error in failures or [cause] if "RankStalledError" in _names(error)]
        text = stalled[0] if stalled else WORKER_DIED
    elif "RayError" in _names(cause):
        text = text.splitlines()[-1]
    return Failed(
        exception="" if died else type(cause).__name__,
        message=text.splitlines()[0],
        traceback="".join(traceback.format_exception(cause))[-20_000:],
        died=died,
        attempts=attempts,
    )


def count_failures(failures: int, best_progress: float, progress: float) -> tuple[int, float]:
    """Deaths in a row without progress, this one included; and the best progress so far.

    `failures` and `best_progress` are what this returned for the attempt before. An attempt that made progress resets
    the count; one that dies where an earlier one died does not, however many epochs it repeated.
    """
    return (1, progress) if progress > best_progress else (failures + 1, best_progress)


def is_lost_peer(error: BaseException) -> bool:
    """A collective that ended because another rank is gone, which is noticed before Ray notices a lost node."""
    names = _names(error)
    return bool(names & _COLLECTIVES) or ("RuntimeError" in names and _LOST_PEER.search(str(error)) is not None)


def is_death(error: BaseException) -> bool:
    """A process or node that ended without an exception of its own."""
    return bool(_names(error) & _DEATHS)


def _names(error: BaseException) -> set[str]:
    """Of its class and those that it is derived from: Ray's and torch's are not imported here."""
    return {cls.__name__ for cls in type(error).__mro__}


def _unwrap(error: BaseException) -> BaseException:
    """The exception that was raised in another process."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
