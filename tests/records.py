"""Records for the tests of reports: a real plan's spec, invented figures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from harness import plan
from harness.results.values import EpochMetrics, Failure, Measurement, Memory, Record, RunResult
from harness.search_space import parse_settings

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
NO_GPU = Measurement(value=None, reason="no GPU was used")
ENVIRONMENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False,
    "versions": {"resnet-harness": "0.1.0", "torch": "2.15.0", "ray": "2.60.0"},
    "command": ["harness", "run", "--depths", "20,32", "--data-dir", "my data"],
}  # fmt: skip


def make_epoch(epoch: int, **changes: Any) -> EpochMetrics:
    values: dict[str, Any] = {
        "epoch": epoch, "steps": 391, "images": 50_000, "loss": 1.5, "error": 40.0 - epoch, "lr": 0.1,
        "train_seconds": 10.0, "data_stall_seconds": 0.5, "eval_seconds": 1.0, "images_per_second": 5_000.0,
    }  # fmt: skip
    return EpochMetrics(**(values | changes))


def make_memory(**mib: float | Measurement) -> Memory:
    """Of these figures; no others were measured."""
    names = ("torch_allocated_mib", "torch_reserved_mib", "nvml_process_mib", "rss_mib")
    read = {n: v if isinstance(v, Measurement) else Measurement(value=v) for n, v in mib.items()}
    return Memory(**(dict.fromkeys(names, NO_GPU) | read))


def make_result(error: float, seconds: float = 4.0, **changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "parameters": 272_292, "evaluated_on": "test", "evaluated_images": 10_000, "final_error": error, "best_error": error - 0.2,
        "best_epoch": 170, "epoch_seconds": seconds, "warmup_epochs": 1, "eval_seconds": 0.5,
        "images_per_second": 50_000 / seconds, "setup_seconds": 9.0, "train_seconds": 180 * seconds,
        "memory": make_memory(rss_mib=900.0), "workers": 1, "batch_size": 128, "batch_size_per_gpu": 128, "threads": 8,
        "device": "NVIDIA H200",
    }  # fmt: skip
    return RunResult(**(values | changes))


def make_record(
    seed: int, error: float, *, seconds: float = 4.0, failure: Failure | None = None,
    epochs: int | None = None, settings: tuple[str, ...] = (), workers: int = 1, environment: dict[str, Any] = ENVIRONMENT,
    result: dict[str, Any] | None = None, **sweep: Any,
) -> Record:  # fmt: skip
    """A run whose spec is a real plan's; `result` changes fields of its own."""
    values = {"variants": ("msra",), "depths": (20,), "dataset": "cifar10"} | sweep
    asked = plan.Grid(seeds=(seed,), epochs=epochs, settings=parse_settings(settings), **values)
    width = plan.Allocation(device="cuda", gpus=workers, workers=workers, concurrent_runs=1, threads=8)
    (spec,) = plan.expand(asked, width, fingerprint="f" * 64, train_images=50_000)
    machine = {"python": "3.12.1", "gpu": "NVIDIA H200", "driver": "580.1"}
    own = {"workers": workers, "batch_size_per_gpu": 128 // workers, "machine": machine} | (result or {})
    network = spec.network
    return Record(
        key=spec.key, name=f"cifar10_{spec.variant}-{network.depth}_s{seed}_{spec.key[:8]}", variant=spec.variant,
        status="failed" if failure else "done", depth=network.depth, seed=seed, dataset="cifar10", original=True,
        spec=spec.to_json(), result=None if failure else make_result(error, seconds, **own), failure=failure,
        environment=environment, started_at=NOW - timedelta(days=1), finished_at=NOW,
    )  # fmt: skip
