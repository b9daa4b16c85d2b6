"""Seconds of `harness --help`, and of `harness report` over many stored runs, each in a fresh process.

    python benchmarks/report.py 1000 10000 [--json FILE]

The runs are invented. Seconds are wall time, start of Python and imports included. Target: 0.3 s for --help, 3 s for a
table of 10,000 runs, 6 s for their page.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

from rounds import harness_seconds, make_table, median_and_range, process_seconds, take_turns, write_readings
from synthetic import store_runs

from harness.cluster.job import Allocation
from harness.plan import Grid, expand

FORMATS = ("table", "markdown", "csv", "json", "latex", "html")


def store_many(out: Path, runs: int) -> None:
    """All depths and five seeds, by loader and learning rate, until there are so many."""
    width = Allocation(device="cuda", gpus=1, workers=1, concurrent_runs=1, threads=8)
    grids = (
        Grid(
            variants=("msra",),
            depths=(20, 32, 44, 56, 110),
            seeds=tuple(range(5)),
            loader=loader,
            settings={"lr": lr},
        )
        for lr, loader in product((0.1 / (1 + k) for k in range(runs)), ("dali", "resident", "dataloader"))
    )
    specs = (spec for grid in grids for spec in expand(grid, width, fingerprint="f" * 64, train_images=50_000))
    os.fsync = lambda _: None  # type: ignore[assignment]
    store_runs(out, islice(specs, runs), epochs=180)


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    sizes = {name: f"{size / 2**20:.2f}" for name, size in content["bytes"].items()}
    rows = [(name, median_and_range(s), sizes.get(name, "–")) for name, s in content["readings"].items()]
    return make_table(("command", "seconds", "MiB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = take_turns(
        {
            "python -c pass": partial(process_seconds, [sys.executable, "-c", "pass"]),
            "harness --help": partial(harness_seconds, "--help"),
        },
        options.rounds,
        warmup=1,
    )
    sizes = {}
    for runs in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "runs"
            store_many(out, runs)
            page = Path(folder) / "report"
            ways = {
                f"{runs:,} runs, {format}": partial(
                    harness_seconds, "report", out, "--format", format, "--output", page.with_suffix(f".{format}")
                )
                for format in FORMATS
            }
            seconds |= take_turns(ways, options.rounds, warmup=1)
            sizes[f"{runs:,} runs, html"] = page.with_suffix(".html").stat().st_size
    content = {"readings": seconds, "bytes": sizes}
    print(describe(content))
    write_readings(options.json, **content)


if __name__ == "__main__":
    main()
