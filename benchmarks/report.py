"""Seconds of `harness --help`, and of `harness report` over many stored runs, each in a fresh process.

    python benchmarks/report.py [--runs 1000,10000] [--json FILE]

The runs are invented. Seconds are wall time, start of Python and imports included. Target: 0.3 s for --help, 3 s for a
table of 10,000 runs, 6 s for their page.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from rounds import harness, make_table, median_and_range, parse_options, process_seconds, publish, take_turns
from synthetic import store_runs

from harness.cluster.job import Allocation
from harness.plan import Grid, expand

LOADERS = ("dali", "resident", "dataloader")
FORMATS = ("table", "markdown", "csv", "json", "latex", "html")


def store_many(out: Path, runs: int) -> None:
    """All depths and five seeds, by loader and learning rate, until there are so many."""
    width = Allocation(device="cuda", gpus=1, workers=1, concurrent_runs=1, threads=8)
    base = Grid(variants=("msra",), depths=(20, 32, 44, 56, 110), seeds=tuple(range(5)))
    grids = (replace(base, loader=loader, settings={"lr": 0.1 / k}) for k in count(1) for loader in LOADERS)
    specs = (spec for grid in grids for spec in expand(grid, width, fingerprint="f" * 64, train_images=50_000))
    os.fsync = lambda _: None  # type: ignore[assignment]
    store_runs(out, islice(specs, runs), epochs=180)


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    sizes = {name: f"{size / 2**20:.2f}" for name, size in content["bytes"].items()}
    rows = [(name, median_and_range(s), sizes.get(name, "–")) for name, s in content["readings"].items()]
    return make_table(("command", "seconds", "MiB"), rows)


def main() -> None:
    options = parse_options(__doc__, runs="1000,10000", rounds=10, warmup=1)

    def time_all(commands: dict[str, list[str]]) -> dict[str, list[float]]:
        ways = {name: partial(process_seconds, command) for name, command in commands.items()}
        return take_turns(ways, options.rounds, warmup=options.warmup)

    sizes = {}
    readings = time_all({"python -c pass": [sys.executable, "-c", "pass"], "harness --help": harness("--help")})
    for runs in map(int, options.runs.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            out, page = Path(folder) / "runs", Path(folder) / "report.html"
            store_many(out, runs)
            readings |= time_all({
                f"{runs:,} runs, {form}": harness("report", out, "--format", form, "--output", page.with_suffix(f".{form}"))
                for form in FORMATS
            })  # fmt: skip
            sizes[f"{runs:,} runs, html"] = page.stat().st_size
    publish(describe, options.json, readings=readings, bytes=sizes)


if __name__ == "__main__":
    main()
