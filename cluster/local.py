"""The signature of `harness.cluster.launch.launch`, in this process and without Ray: one worker, for debugging."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.cluster.failures import make_failed
from harness.cluster.job import (
    Allocation,
    Entered,
    Failed,
    Outcome,
    Report,
    Spec,
    Started,
    StartSampler,
    Telemetry,
    Worker,
)


def launch(
    train: Callable[[Spec, Worker, Report], Outcome],
    specs: Sequence[Spec],
    job: Allocation,
    *,
    progress: Callable[[Spec, Any], None],
    telemetry: StartSampler | None = None,
    progress_of: Callable[[Any], float] = lambda _: 0.0,
) -> Iterator[tuple[Spec, Outcome | Failed]]:
    """Run every spec, one after another; yield each as it ends. Raises ValueError for more than one worker."""
    if job.workers != 1:
        raise ValueError(f"the local launcher runs one worker, not {job.workers}: use --launcher ray")
    cuda = job.device == "cuda"
    worker = Worker(device="cuda:0" if cuda else "cpu", threads=job.threads, runs_per_gpu=job.runs_per_gpu)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if cuda else ""
    for spec in specs:
        progress(spec, Started(attempt=1))
        progress(spec, Entered())
        sampler = None
        if telemetry is not None:
            with contextlib.suppress(Exception):
                sampler = telemetry(visible)
        try:
            outcome: Outcome | Failed = train(spec, worker, lambda event, spec=spec: progress(spec, event))  # type: ignore[misc]
        except Exception as error:
            outcome = make_failed(error, attempts=1)
        finally:
            if sampler is not None:
                with contextlib.suppress(Exception):
                    progress(spec, Telemetry(node=sampler.stop()))
        yield spec, outcome
