"""What 10,000 runs on 512 GPUs cost the driver: planning, scheduling, recording, reporting; training is a stub.

    python benchmarks/scale.py --runs 10000 --out /tmp/scale

The cluster is simulated: 64 nodes of 8 GPUs are said to be there, a run's workers return a result at once. Everything
else is the harness's own: plan, locks, the launcher's threads and its board (a Ray actor in this machine), progress,
records, report. Prints a Markdown table against its targets; exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import harness.cluster.launch
from harness import plan
from harness.cluster.launch import Cluster, Entered, Node, Started
from harness.commands import run as execute
from harness.commands.run import Options
from harness.loaders.datasets import load_dataset
from harness.plan import Grid
from harness.results.values import EpochMetrics, Measurement, Memory, RunResult
from harness.spec import RunSpec

NODES, GPUS_PER_NODE, CPUS_PER_NODE = 64, 8, 64
DEPTHS = (20, 32, 44, 56, 110)
VARIANTS = ("he2015", "msra")
EPOCHS = 4  # reported by each run
TARGETS = {
    "planning, seconds": 2.0,
    "report, seconds": 3.0,
    "overhead of a run, milliseconds": 50.0,
    "driver's peak memory, MiB": 1024.0,
}


def make_result(spec: RunSpec) -> RunResult:
    """What a run might have measured."""
    error = 10 - spec.network.depth / 40 + spec.seed % 7 / 10
    epochs = tuple(
        EpochMetrics(
            epoch=k, steps=391, images=50_000, loss=1 / k, error=error + EPOCHS - k, lr=0.1, train_seconds=2.0,
            data_stall_seconds=0.1, eval_seconds=0.2, images_per_second=25_000, timed=k > 1,
        )
        for k in range(1, EPOCHS + 1)
    )  # fmt: skip
    none = Measurement(value=None, reason="simulated")
    return RunResult(
        parameters=270_000, evaluated_on="test", epochs=epochs, final_error=error, best_error=error, best_epoch=EPOCHS,
        epoch_seconds=2.0, warmup_epochs=1, eval_seconds=0.2, images_per_second=25_000, setup_seconds=3.0,
        train_seconds=8.0, workers=spec.workers, batch_size=spec.recipe.batch_size,
        batch_size_per_gpu=spec.recipe.batch_size // spec.workers, threads=8, device="simulated",
        memory=Memory(torch_allocated_mib=none, torch_reserved_mib=none, nvml_process_mib=none, rss_mib=none),
    )  # fmt: skip


def run_at_once(
    train: Any, pack: tuple[RunSpec, ...], index: int, board: Any, **rest: Any
) -> tuple[RunResult, ...]:
    """Stands for harness.cluster.launch._run_one: the same events and outcome, no workers."""
    import ray

    del train, rest
    board.put.remote(index, Started(attempt=1))
    board.put.remote(index, Entered())
    (spec,) = pack
    result = make_result(spec)
    for epoch in result.epochs:
        last = board.put.remote(index, execute.OfOne(0, epoch))
    ray.get(last)  # training would take longer than this
    return (result,)


def timed(seconds: dict[str, float], name: str, function: Any) -> Any:
    """The function, with its wall time noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = time.perf_counter() - began

    return call


def main() -> int:
    """Simulate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True, help="an empty or absent folder")
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    seeds = -(-options.runs // (len(DEPTHS) * len(VARIANTS)))
    sweep = Grid(variants=VARIANTS, depths=DEPTHS, seeds=tuple(range(seeds)), dataset="digits", loader="resident")
    simulated = Cluster(members=(Node(cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE),) * NODES)
    connect = harness.cluster.launch.connect

    def connect_here(address: str | None, **rest: Any) -> Cluster:
        connect(None, cpus=1, gpus=0)
        return simulated

    seconds: dict[str, float] = {}
    replaced: dict[str, Any] = {
        "connect": connect_here,
        "_check_nodes": lambda *_: None,
        "_train": timed(seconds, "train", execute._train),
    }
    for name, function in replaced.items():
        setattr(execute, name, function)
    harness.cluster.launch._run_one = run_at_once  # type: ignore[assignment]
    plan.expand = timed(seconds, "expand", plan.expand)
    execute.finished_keys = timed(seconds, "finished", execute.finished_keys)

    load_dataset("digits")
    console = Console(file=io.StringIO(), width=120)
    asked = Options(out=options.out, gpus=NODES * GPUS_PER_NODE, workers=GPUS_PER_NODE, address="simulated:1")
    code = execute.run_grid(sweep, asked, console)
    runs = len(list(options.out.glob("*/record.json")))
    assert (code, runs) == (0, seeds * len(DEPTHS) * len(VARIANTS)), (code, runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    began = time.perf_counter()
    execute.run_grid(sweep, asked, console)
    again = time.perf_counter() - began
    reports = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "harness.cli", "report", str(options.out)], check=True, capture_output=True
        )
        reports.append(time.perf_counter() - began)
    measured = {
        "planning, seconds": seconds["expand"],
        "report, seconds": min(reports),
        "overhead of a run, milliseconds": 1000 * seconds["train"] / runs,
        "driver's peak memory, MiB": peak,
    }
    print(
        f"{runs} runs of {GPUS_PER_NODE} workers, {NODES * GPUS_PER_NODE} GPUs, {os.cpu_count()} CPU cores here\n"
    )
    print("| measured | is | target |\n|---|---:|---:|")
    for name, value in measured.items():
        print(f"| {name} | {value:.2f} | {TARGETS[name]:g} |")
    print(f"| the same command again, nothing left to do, seconds | {again:.2f} | |")
    print(f"| of that, reading what is finished, seconds | {seconds['finished']:.2f} | |")
    return int(any(value > TARGETS[name] for name, value in measured.items()))


if __name__ == "__main__":
    sys.exit(main())
