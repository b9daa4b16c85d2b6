"""Seconds that a command takes beside its training: python benchmarks/startup.py [--rounds 10] [--json FILE]

`harness run` with one run and with three seeds, by each launcher, and `harness tune` with one trial and with three, in fresh
processes that take turns. A reading is the command's wall time less the training and evaluation that its runs hold;
what a further run or trial of a command costs is the difference of the two, halved.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rounds import harness, make_table, median_and_range, parse_options, process_seconds, publish, take_turns

EPOCHS = 2
TRAINING = f"--dataset digits --limit-train 256 --epochs {EPOCHS} --gpus 0 --loader resident --workers 1".split()
COMMANDS = {
    "local": "run --depths 8 --launcher local --seeds",
    "ray": "run --depths 8 --launcher ray --seeds",
    "tune": "tune --depth 8 --search lr=loguniform(0.003,0.3) --scheduler none --concurrent 1 --samples",
}


def measure(command: str, runs: int) -> float:
    """Seconds of one command beside its training and evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "runs"
        wall = process_seconds(harness(*command.split(), runs, *TRAINING, "--out", out))
        epochs = [
            json.loads(line) for path in out.glob("*/epochs.jsonl") for line in path.read_text().splitlines()
        ]
    assert len(epochs) == EPOCHS * runs, f"{len(epochs)} epochs of {runs} runs"
    return float(wall - sum(epoch["train_seconds"] + epoch["eval_seconds"] for epoch in epochs))


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    readings, rows = content["readings"], []
    for name in COMMANDS:
        one, three = readings[f"{name} 1"], readings[f"{name} 3"]
        further = [(b - a) / 2 for a, b in zip(one, three, strict=True)]
        rows.append([name, median_and_range(one), median_and_range(further)])
    return make_table(("launcher", "a command of one run, seconds", "each further run, seconds"), rows)


def main() -> None:
    options = parse_options(__doc__, rounds=10, warmup=1)
    ways = {f"{name} {runs}": partial(measure, words, runs) for name, words in COMMANDS.items() for runs in (1, 3)}
    publish(describe, options.json, readings=take_turns(ways, options.rounds, warmup=options.warmup))


if __name__ == "__main__":
    main()
