"""How long `harness report` takes over many stored runs: make them, then load and print them in a fresh process.

    python benchmarks/report.py 1000 10000

Seconds are wall time of the whole process, imports and start of Python included; best and median of five.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from harness.results import store
from harness.results.values import EpochMetrics, Failure, Measurement, Memory, Record, RunResult

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEPTHS = (20, 32, 44, 56, 110)
LOADERS = ("dali", "resident", "dataloader")
SEEDS = 5


def make_epochs(random: Random, epochs: int) -> tuple[EpochMetrics, ...]:
    """Epochs that look like a training run's."""
    return tuple(
        EpochMetrics(
            epoch=k,
            steps=391,
            images=50_000,
            loss=2 / k + random.random() / 10,
            error=8 + 60 / k + random.random() / 4,
            lr=0.1 if k < 90 else 0.01,
            train_seconds=10 + random.random() / 5,
            data_stall_seconds=random.random() / 5,
            eval_seconds=0.8,
            images_per_second=5_000.0,
            timed=k > 1,
        )
        for k in range(1, epochs + 1)
    )


def make_record(number: int, epochs: int) -> Record:
    """The run of that number: all depths, loaders, learning rates and seeds in turn; one in fifty failed."""
    random = Random(number)
    rest, seed = divmod(number, SEEDS)
    rest, depth = divmod(rest, len(DEPTHS))
    lr, loader = divmod(rest, len(LOADERS))
    spec: dict[str, Any] = {
        "variant": "msra",
        "network": {"depth": DEPTHS[depth], "architecture": "cifar", "block": "basic", "shortcut": "identity-conv",
                    "head_batch_norm": True, "batch_norm_eps": 1e-5, "activation": "relu"},
        "recipe": {"duration": 180, "unit": "epoch", "batch_size": 128, "lr": 0.1 / (1 + lr), "schedule": "multistep",
                   "milestones": [90, 135], "gamma": 0.1, "warmup": 0, "warmup_lr": 0.0, "momentum": 0.9,
                   "nesterov": False, "weight_decay": 1e-4, "decay": "all", "label_smoothing": 0.0, "mixup": 0.0,
                   "normalize": "channel-mean", "pad": 4, "pad_mode": "zero", "crop": None, "flip": True, "val": 0},
        "overrides": [f"lr={0.1 / (1 + lr)}"] if lr else [],
        "dataset": "cifar10", "fingerprint": "0123456789abcdef" * 4, "limit_train": None, "loader": LOADERS[loader],
        "precision": "fp32", "engine": "eager", "device": "cuda", "workers": 1, "seed": seed,
    }  # fmt: skip
    key = f"{number:016x}"
    failed = number % 50 == 49
    none = Measurement(value=None, reason="not permitted")
    curve = make_epochs(random, epochs)
    result = RunResult(
        parameters=272_292,
        evaluated_on="test",
        epochs=curve,
        final_error=8 + random.random(),
        best_error=7.8 + random.random() / 5,
        best_epoch=epochs,
        epoch_seconds=10 + random.random(),
        warmup_epochs=1,
        eval_seconds=0.8,
        images_per_second=5_000.0,
        data_stall_percent=1.0,
        setup_seconds=9.0,
        train_seconds=1_800.0,
        memory=Memory(
            torch_allocated_mib=Measurement(value=400.0 + random.random()),
            torch_reserved_mib=Measurement(value=512.0),
            nvml_process_mib=none,
            rss_mib=Measurement(value=2_000.0),
        ),
        workers=1,
        batch_size=128,
        batch_size_per_gpu=128,
        threads=8,
        device="NVIDIA H200",
    )
    return Record(
        key=key,
        name=store.run_name("cifar10", "msra", DEPTHS[depth], seed, f"{number:08x}"),
        status="failed" if failed else "done",
        variant="msra",
        depth=DEPTHS[depth],
        seed=seed,
        dataset="cifar10",
        original=True,
        spec=spec,
        result=None if failed else result,
        failure=Failure(kind="OOM", message="CUDA out of memory") if failed else None,
        environment={"commit": "0" * 40, "dirty": False, "versions": {"torch": "2.15.0"}, "host": "node"},
        started_at=NOW,
        finished_at=NOW + timedelta(seconds=number),
    )


def make_store(out: Path, runs: int, epochs: int) -> None:
    """Store that many synthetic runs, as `harness run` stores them but for the flush to the disk."""
    os.fsync = lambda _: None  # type: ignore[assignment]
    for number in range(runs):
        record = make_record(number, epochs)
        (store.fail if record.status == "failed" else store.finish)(out, record)


def measure(out: Path, format: str, repeats: int = 5) -> tuple[list[float], int]:
    """Seconds of each fresh `harness report`, and the bytes that it wrote."""
    seconds = []
    file = out.parent / f"report.{format}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "harness.cli", "report", str(out), "--format", format, "--output", str(file)]
    for _ in range(1 + repeats):  # the first one compiles what is imported, and bundles the page's scripts
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return seconds[1:], file.stat().st_size


def main() -> None:
    for runs in map(int, sys.argv[1:] or ("1000", "10000")):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "runs"
            make_store(out, runs, epochs=180)
            for format in ("table", "markdown", "csv", "json", "latex", "html"):
                seconds, size = measure(out, format)
                print(
                    f"{runs:6,} runs to {format:8}: best {min(seconds):.2f} s, median {statistics.median(seconds):.2f} s, "
                    f"{size / 2**20:.2f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
