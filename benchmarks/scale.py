"""What 10,000 runs on 512 GPUs cost the driver: planning, scheduling, recording, reporting; training is a stub.

    python benchmarks/scale.py --runs 10000 --out /tmp/scale

The cluster is simulated: 64 nodes of 8 GPUs, whose workers return a result at once. Everything else is the harness's own
code: plan, locks, the launcher's threads and its mailbox (a Ray actor on this machine), progress, records, report. Prints
a Markdown table against its targets; exit code 1 where one is missed.
"""

from __future__ import annotations

import io
import os
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rounds import harness, make_table, parse_options, process_seconds, publish
from synthetic import make_result

from harness import plan, resources
from harness.cluster import launch
from harness.cluster.connect import connect, disconnect
from harness.cluster.job import Ended, Entered, Started
from harness.cluster.nodes import Cluster, Node
from harness.commands import run
from harness.loaders.datasets import load_dataset
from harness.options import Grid, RunOptions
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


def end_at_once(attempts: Any) -> None:
    """In place of `_Run.run`: the same events and outcome, no workers."""
    import ray

    for event in (Started(attempt=1), Entered()):
        attempts.put(event)
    result = make_result(attempts.driver.specs[attempts.index], EPOCHS)
    for reported in (*result.epochs, Ended(outcome=result)):
        last = attempts.mailbox.put.remote(attempts.index, reported)
    ray.get(last)  # training would take longer than this


def join_simulated(stack: ExitStack, address: str | None, **rest: Any) -> Cluster:
    """In place of `join_cluster`: Ray on this machine, and a large cluster in what is returned."""
    connect(None, cpus=1, gpus=0)
    stack.callback(disconnect)
    return (Node(cpus=CPUS_PER_NODE, gpus=GPUS_PER_NODE),) * NODES


def timed(seconds: dict[str, float], owner: Any, name: str) -> Any:
    """In place of an attribute: the same function, its wall time noted."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] = time.perf_counter() - began

    return patch.object(owner, name, call)


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    rows = [(name, f"{value:.2f}", TARGETS.get(name, "–")) for name, value in content["readings"].items()]
    return make_table(("measured", "is", "target"), rows)


def main() -> int:
    """Simulate, measure, print."""
    options = parse_options(__doc__, runs=10_000, out=Path("runs/scale"))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    load_dataset("digits")
    seeds = tuple(range(-(-options.runs // (len(DEPTHS) * len(VARIANTS)))))
    grid = Grid(variants=VARIANTS, depths=DEPTHS, seeds=seeds, dataset="digits", loader="resident", epochs=EPOCHS)
    choice = RunOptions(
        out=str(options.out),
        gpus=NODES * GPUS_PER_NODE,
        workers=GPUS_PER_NODE,
        address="simulated:1",
        no_check=True,
    )
    text = io.StringIO()
    runs, console = len(seeds) * len(DEPTHS) * len(VARIANTS), Console(file=text, width=120)
    seconds: dict[str, float] = {}
    with (
        patch.object(resources, "join_cluster", join_simulated), patch.object(launch._Run, "run", end_at_once),
        patch.object(run.Runs, "check_nodes"), timed(seconds, run.Runs, "train_batch"), timed(seconds, plan, "expand"),
        timed(seconds, Recorder, "find_finished"), timed(seconds, run, "run_grid"),
    ):  # fmt: skip
        code = run.run_grid(grid, choice, console)
        stored = len(list(options.out.glob("*/record.json")))
        assert (code, stored) == (0, runs), (code, stored, text.getvalue())
        peak, first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, dict(seconds)
        run.run_grid(grid, choice, console)
    readings = {
        "planning, seconds": first["expand"],
        "report, seconds": min(process_seconds(harness("report", options.out)) for _ in range(3)),
        "overhead of a run, milliseconds": 1000 * first["train_batch"] / runs,
        "driver's peak memory, MiB": peak,
        "the same command again, nothing left to do, seconds": seconds["run_grid"],
        "of that, reading what is finished, seconds": seconds["find_finished"],
    }
    publish(
        describe, options.json, runs=runs, workers=GPUS_PER_NODE, gpus=NODES * GPUS_PER_NODE, readings=readings
    )
    return int(any(readings[name] > limit for name, limit in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
