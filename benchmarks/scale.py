"""What 10,000 runs on 512 GPUs cost the driver: planning, scheduling, recording, reporting; training is a stub.

    python benchmarks/scale.py --runs 10000 --out /tmp/scale

The cluster is simulated: 64 nodes of 8 GPUs, whose workers return a result at once. Everything else is the harness's own
code: plan, locks, the launcher's threads and its mailbox (a Ray actor on this machine), progress, records, report. Prints
a Markdown table against its targets; exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rounds import harness_seconds, make_table, write_readings
from synthetic import make_result

import harness.cluster.launch
from harness import plan, resources
from harness.cluster.connect import connect, disconnect
from harness.cluster.job import Entered, Started
from harness.cluster.nodes import Cluster, Node
from harness.commands import run
from harness.loaders.datasets import load_dataset
from harness.record import Recorder

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


def end_at_once(attempts: Any) -> Any:
    """In place of `_Run.run`: the same events and outcome, no workers."""
    import ray

    attempts._put(Started(attempt=1))
    attempts._put(Entered())
    result = make_result(attempts.spec, EPOCHS)
    for epoch in result.epochs:
        last = attempts.mailbox.put.remote(attempts.index, epoch)
    ray.get(last)  # training would take longer than this
    return result


def join_simulated(stack: ExitStack, address: str | None, **rest: Any) -> Cluster:
    """In place of `join_cluster`: Ray on this machine, and a large cluster in what is returned."""
    connect(None, cpus=1, gpus=0)
    stack.callback(disconnect)
    return Cluster(members=(Node(cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE),) * NODES)


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Any:
    """The function, with its wall time noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = time.perf_counter() - began

    return call


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    rows = [(name, f"{value:.2f}", TARGETS.get(name, "–")) for name, value in content["readings"].items()]
    return make_table(("measured", "is", "target"), rows)


def main() -> int:
    """Simulate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True, help="an empty or absent folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    seconds: dict[str, float] = {}
    content: dict[str, Any]
    resources.join_cluster = join_simulated
    harness.cluster.launch._Run.run = end_at_once  # type: ignore[method-assign]
    run._Prepared.check_nodes = lambda _: None  # type: ignore[method-assign]
    run.train_batch = timed(seconds, "train", run.train_batch)
    plan.expand = timed(seconds, "expand", plan.expand)
    Recorder.find_finished = timed(seconds, "finished", Recorder.find_finished)  # type: ignore[method-assign]

    load_dataset("digits")
    console = Console(file=io.StringIO(), width=120)
    count = -(-args.runs // (len(DEPTHS) * len(VARIANTS)))
    grid = plan.Grid(
        variants=VARIANTS, depths=DEPTHS, seeds=tuple(range(count)), dataset="digits", loader="resident"
    )
    options = run.RunOptions(
        out=str(args.out), gpus=NODES * GPUS_PER_NODE, workers=GPUS_PER_NODE, address="simulated:1"
    )
    code = run.run_grid(grid, options, console)
    runs = len(list(args.out.glob("*/record.json")))
    assert (code, runs) == (0, count * len(DEPTHS) * len(VARIANTS)), (code, runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    again = {"again": 0.0}
    timed(again, "again", run.run_grid)(grid, options, console)
    content = {
        "runs": runs,
        "workers": GPUS_PER_NODE,
        "gpus": NODES * GPUS_PER_NODE,
        "cpus": os.cpu_count(),
        "readings": {
            "planning, seconds": seconds["expand"],
            "report, seconds": min(harness_seconds("report", args.out) for _ in range(3)),
            "overhead of a run, milliseconds": 1000 * seconds["train"] / runs,
            "driver's peak memory, MiB": peak,
            "the same command again, nothing left to do, seconds": again["again"],
            "of that, reading what is finished, seconds": seconds["finished"],
        },
    }
    print(describe(content))
    write_readings(args.json, **content)
    return int(any(content["readings"][name] > limit for name, limit in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
