"""Seconds that a command takes beside its training: python benchmarks/startup.py [--rounds 10] [--json FILE]

`harness run` with one run and with three seeds, by each launcher, in fresh processes that take turns. A reading is the
command's wall time less the training and evaluation that its records hold; what a further run of a command costs is the
difference of the two, halved.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rounds import harness_seconds, make_table, median_and_range, take_turns, write_readings

TRAINING = "--dataset digits --depths 8 --limit-train 256 --epochs 2 --gpus 0 --loader resident --workers 1"
LAUNCHERS = ("local", "ray")


def measure(launcher: str, seeds: int) -> float:
    """Seconds of one command beside its training and evaluation."""
    with tempfile.TemporaryDirectory() as out:
        wall = harness_seconds(
            "run", *TRAINING.split(), "--launcher", launcher, "--seeds", seeds, "--out", Path(out) / "runs"
        )
        epochs = [
            json.loads(line)
            for path in Path(out).glob("runs/*/epochs.jsonl")
            for line in path.read_text().splitlines()
        ]
    assert len(epochs) == 2 * seeds, f"{len(epochs)} epochs of {seeds} runs"
    return wall - sum(epoch["train_seconds"] + epoch["eval_seconds"] for epoch in epochs)


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    readings, rows = content["readings"], []
    for launcher in LAUNCHERS:
        one, three = readings[f"{launcher} 1"], readings[f"{launcher} 3"]
        further = [(b - a) / 2 for a, b in zip(one, three, strict=True)]
        rows.append([launcher, median_and_range(one), median_and_range(further)])
    return make_table(("launcher", "a command of one run, seconds", "each further run, seconds"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    ways = {f"{launcher} {seeds}": partial(measure, launcher, seeds) for launcher in LAUNCHERS for seeds in (1, 3)}
    content = {"readings": take_turns(ways, options.rounds, warmup=1)}
    print(describe(content))
    write_readings(options.json, **content)


if __name__ == "__main__":
    main()
