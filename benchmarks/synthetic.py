"""Invented results of real specs, for what is measured without training: reports, schedules, stores."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

from harness.results import store
from harness.results.values import EpochMetrics, Failure, Measurement, Memory, Record, RunResult
from harness.spec import RunSpec

STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def make_result(spec: RunSpec, epochs: int) -> RunResult:
    """What a run might have measured; the same spec gives the same figures."""
    random = Random(spec.key)
    error = round(10 - spec.network.depth / 40 + random.random(), 2)  # a whole number of 10,000 images
    curve = tuple(
        EpochMetrics(
            epoch=k, steps=391, images=50_000, loss=2 / k + random.random() / 10, error=error + 60 / k, lr=0.1,
            train_seconds=10 + random.random() / 5, data_stall_seconds=random.random() / 5, eval_seconds=0.8,
            images_per_second=5_000.0, timed=k > 1,
        )
        for k in range(1, epochs + 1)
    )  # fmt: skip
    none = Measurement(value=None, reason="invented")
    return RunResult(
        parameters=272_292, evaluated_on="test", evaluated_images=10_000, epochs=curve, final_error=error, best_error=round(error - 0.2, 2),
        best_epoch=epochs, epoch_seconds=10 + random.random(), warmup_epochs=1, eval_seconds=0.8, images_per_second=5_000.0,
        data_stall_percent=1.0, setup_seconds=9.0, train_seconds=1_800.0, workers=spec.workers, threads=8, device="invented",
        batch_size=spec.recipe.batch_size, batch_size_per_gpu=spec.recipe.batch_size // spec.workers,
        memory=Memory(torch_allocated_mib=Measurement(value=400 + random.random()), torch_reserved_mib=Measurement(value=512.0),
                      nvml_process_mib=none, rss_mib=Measurement(value=2_000.0)),
    )  # fmt: skip


def store_runs(out: Path, specs: Iterable[RunSpec], epochs: int) -> int:
    """Store an invented run of every spec, one in fifty as failed; how many."""
    count = 0
    for count, spec in enumerate(specs, 1):
        failed = count % 50 == 0
        record = Record(
            key=spec.key,
            name=store.run_name(spec.dataset, spec.variant, spec.network.depth, spec.seed, spec.key),
            status="failed" if failed else "done", variant=spec.variant, depth=spec.network.depth, seed=spec.seed,
            dataset=spec.dataset, original=True, spec=spec.to_json(),
            result=None if failed else make_result(spec, epochs),
            failure=Failure(kind="OOM", message="CUDA out of memory") if failed else None,
            environment={"commit": "0" * 40, "dirty": False, "versions": {"torch": "2.15.0"}, "host": "node"},
            started_at=STARTED, finished_at=STARTED + timedelta(seconds=count),
        )  # fmt: skip
        store.finish(out, record)
    return count
