"""The same signature as `harness.cluster.launch.launch`, in this process and without Ray: one worker, for debugging."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.cluster.launch import Entered, Failed, Outcome, Report, Spec, Started, Watch, Watched, Worker


def launch(
    train: Callable[[Spec, Worker, Report], Outcome],
    specs: Sequence[Spec],
    *,
    workers: int,
    concurrent_runs: int,
    gpu: bool,
    threads: int,
    storage: Path | str,
    progress: Callable[[Spec, Any], None],
    retries: int = 0,
    placement: str = "pack",
    placement_timeout_seconds: float = 0.0,
    fewer: Sequence[int] = (),
    watch: Watch | None = None,
    reached: Callable[[Any], float] = lambda _: 0.0,
) -> Iterator[tuple[Spec, Outcome | Failed]]:
    """Run every spec, one after another; yield each as it ends. Raises ValueError for more than one worker."""
    del concurrent_runs, storage, retries, placement, placement_timeout_seconds, fewer, reached
    if workers != 1:
        raise ValueError(f"the local launcher runs one worker, not {workers}: use --launcher ray")
    for spec in specs:
        progress(spec, Started(attempt=1))
        progress(spec, Entered())
        worker = Worker(device="cuda:0" if gpu else "cpu", threads=threads)
        watching = None
        if watch is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            with contextlib.suppress(Exception):
                watching = watch(visible if gpu else "")
        try:
            outcome: Outcome | Failed = train(spec, worker, lambda event, spec=spec: progress(spec, event))  # type: ignore[misc]
        except Exception as error:
            outcome = Failed(
                exception=type(error).__name__,
                message=(str(error).strip() or type(error).__name__).splitlines()[0],
                traceback=traceback.format_exc()[-20_000:],
                died=False,
            )
        finally:
            if watching is not None:
                with contextlib.suppress(Exception):
                    progress(spec, Watched(node=watching.stop()))
        yield spec, outcome
