"""How often epochs are marked as disturbed, wrongly and rightly: python benchmarks/marks.py [--rounds 6] [--json FILE]

The same run in fresh processes, alone and beside as many busy processes as there are processors, which take turns. On an idle
machine every mark of a run alone is false; on any machine one is, if its epoch was not slower than its run's median by a tenth. An
epoch beside the busy processes that took twice the median of those alone, or longer, must be marked. How far the peak memory of
the runs alone scatters is shown too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rounds import harness, make_table, parse_options, process_seconds, publish, take_turns
from scipy.stats import binomtest

RUN = "run --dataset digits --depths 8 --gpus 0 --launcher local --loader resident --limit-train 640 --epochs"
SLOWED = 2.0  # times the median epoch of the runs alone
SLOWER = 1.1  # times the median of the same run


def measure(epochs: int, busy: int) -> dict[str, Any]:
    """One run: seconds and marks of its epochs, warm-up left out, and its peak resident memory in MiB."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for _ in range(busy):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        process_seconds(harness(*RUN.split(), epochs, "--out", folder))
        (path,) = Path(folder).glob("*/record.json")
        memory = json.loads(path.read_text(encoding="utf-8"))["result"]["memory"]
        epochs_path = path.with_name("epochs.jsonl")
        rows = [json.loads(line) for line in epochs_path.read_text(encoding="utf-8").splitlines()][1:]
    marked = [[row["train_seconds"], ", ".join(row["interference"])] for row in rows]
    return {"epochs": marked, "rss_mib": memory["rss_mib"]["value"]}


def share(count: int, total: int) -> str:
    """ "3 of 300: 1.0 % [0.2, 2.9]", with the exact 95 % interval."""
    low, high = binomtest(count, total).proportion_ci() if total else (0.0, 1.0)
    return f"{count} of {total}: {100 * count / max(total, 1):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    alone, beside = (
        [row for reading in content["readings"][name] for row in reading["epochs"]] for name in ("alone", "beside")
    )
    limit = SLOWED * statistics.median(seconds for seconds, _ in alone)
    slowed = [mark for seconds, mark in beside if seconds >= limit]
    runs = [reading["epochs"] for reading in content["readings"]["alone"]]
    medians = [statistics.median(seconds for seconds, _ in run) for run in runs]
    false = sum(bool(mark) and s < SLOWER * m for run, m in zip(runs, medians, strict=True) for s, mark in run)
    peaks = [reading["rss_mib"] for reading in content["readings"]["alone"]]
    rows = [
        ("epochs alone that are marked", share(sum(bool(mark) for _, mark in alone), len(alone))),
        (f"of them, less than {SLOWER:g} times their run's median", share(false, len(alone))),
        (f"epochs slowed {SLOWED:g} times that are marked", share(sum(map(bool, slowed)), len(slowed))),
        ("peak memory, largest over smallest run alone", f"{max(peaks) / min(peaks):.3f}"),
    ]
    return make_table(("what", "of how many [95 % interval]"), rows)


def main() -> None:
    options = parse_options(__doc__, rounds=6, warmup=0, epochs=61)
    ways = {
        name: partial(measure, options.epochs, n) for name, n in (("alone", 0), ("beside", os.cpu_count() or 1))
    }
    publish(describe, options.json, readings=take_turns(ways, options.rounds, warmup=options.warmup))


if __name__ == "__main__":
    main()
