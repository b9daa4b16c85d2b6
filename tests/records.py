"""Records for the tests of reports: a real plan's spec, invented figures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from harness import plan
from harness.results.values import Failure, Measurement, Memory, Record, RunResult
from harness.search_space import parse_settings

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
ENVIRONMENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False,
    "versions": {"resnet-harness": "0.1.0", "torch": "2.15.0", "ray": "2.60.0"},
    "command": ["harness", "run", "--depths", "20,32", "--data-dir", "my data"],
}  # fmt: skip


def make_record(
    seed: int, error: float, *, seconds: float = 4.0, failure: Failure | None = None,
    epochs: int | None = None, settings: tuple[str, ...] = (), workers: int = 1, environment: dict[str, Any] = ENVIRONMENT,
    **sweep: Any,
) -> Record:  # fmt: skip
    """A run whose spec is a real plan's."""
    values = {"variants": ("msra",), "depths": (20,), "dataset": "cifar10"} | sweep
    asked = plan.Grid(seeds=(seed,), epochs=epochs, settings=parse_settings(settings), **values)
    width = plan.Allocation(device="cuda", gpus=workers, workers=workers, concurrent_runs=1, threads=8)
    (spec,) = plan.expand(asked, width, fingerprint="f" * 64, train_images=50_000)
    none = Measurement(value=None, reason="no GPU was used")
    memory = Memory(
        torch_allocated_mib=none, torch_reserved_mib=none, nvml_process_mib=none, rss_mib=Measurement(value=900.0)
    )
    result = RunResult(
        parameters=272_292, evaluated_on="test", final_error=error, best_error=error - 0.2, best_epoch=170,
        epoch_seconds=seconds, warmup_epochs=1, eval_seconds=0.5, images_per_second=50_000 / seconds, setup_seconds=9.0,
        train_seconds=180 * seconds, memory=memory, workers=workers, batch_size=128, batch_size_per_gpu=128 // workers,
        threads=8, device="NVIDIA H200", machine={"python": "3.12.1", "gpu": "NVIDIA H200", "driver": "580.1"},
    )  # fmt: skip
    network = spec.network
    return Record(
        key=spec.key, name=f"cifar10_{spec.variant}-{network.depth}_s{seed}_{spec.key[:8]}", variant=spec.variant,
        status="failed" if failure else "done", depth=network.depth, seed=seed, dataset="cifar10", original=True,
        spec=spec.to_json(), result=None if failure else result, failure=failure, environment=environment,
        started_at=NOW - timedelta(days=1), finished_at=NOW,
    )  # fmt: skip
