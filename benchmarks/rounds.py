"""What the benchmarks share: options, timing in rounds, ratios with intervals, tables, and the files of readings.

Ways take turns in counterbalanced rounds (A B C, C B A, ...), so that whatever else the machine does, and any drift,
falls on all alike. Every reading is stored with its command, commit and machine; `claims.py` writes the text from them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tabulate import tabulate

Reading = TypeVar("Reading")
ROOT = Path(__file__).resolve().parent.parent
RESAMPLES = 10_000


def parse_options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Options from their defaults, and --json; a type stands for None, False is a switch, [] takes paths."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (defaults | {"json": Path}).items():
        words: dict[str, Any] = {"type": default}
        if isinstance(default, bool):
            words = {"action": "store_true"}
        elif isinstance(default, list):
            words = {"type": Path, "action": "extend", "nargs": "+", "default": default}
        elif not isinstance(default, type):
            words = {"type": type(default), "default": default, "help": "default: %(default)s"}
        parser.add_argument("--" + name.replace("_", "-"), **words)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # bytecode is worth seconds in every process that is started
    return parser.parse_args()


def take_turns(
    ways: Mapping[str, Callable[[], Reading]], rounds: int, *, warmup: int = 0
) -> dict[str, list[Reading]]:
    """Call every way once a round, every other round in reverse; readings by way, without those of `warmup` rounds."""
    readings: dict[str, list[Reading]] = {name: [] for name in ways}
    for number in range(-warmup, rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            reading = ways[name]()
            if number >= 0:
                readings[name].append(reading)
        print(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up", file=sys.stderr, flush=True)
    return readings


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median over rounds of a / b, with the percentile bootstrap's 95 % interval over rounds."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1: only then is one of the two called faster."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Of readings taken in the same rounds. Raises ValueError for lengths that differ."""
    each = np.array([x / y for x, y in zip(a, b, strict=True)])
    drawn = np.random.default_rng(0).integers(0, len(each), (RESAMPLES, len(each)))
    low, high = np.quantile(np.median(each[drawn], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(each)), float(low), float(high))


def harness(*words: object) -> list[str]:
    """The command line of `harness` with these words, run by this Python."""
    return [sys.executable, "-m", "harness.cli", *map(str, words)]


def process_seconds(command: Sequence[str], **options: Any) -> float:
    """Wall time of a process that must succeed, its start included."""
    began = time.perf_counter()
    subprocess.run(command, check=True, **{"cwd": ROOT, "capture_output": True, **options})
    return time.perf_counter() - began


def median_and_range(values: Sequence[float], digits: int = 3) -> str:
    """ "0.62 (0.59 to 0.70)" """
    shown = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}" for value in shown)
    return f"{middle} ({low} to {high})"


def make_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: words to the left, figures to the right."""
    cells = [list(map(str, row)) for row in rows]
    words = [all(row[i][:1].isalpha() for row in cells) for i in range(len(header))]
    align = ["left" if word else "right" for word in words]
    return tabulate(cells, header, tablefmt="github", disable_numparse=True, colalign=align)


def publish(describe: Callable[[dict[str, Any]], str], path: Path | None, **content: Any) -> None:
    """Print the table of the readings; with a path, store them with command, commit and machine."""
    import torch

    from harness.record import describe_code
    from harness.training.telemetry import describe_machine

    print(describe(content), flush=True)
    if path is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "command": sys.argv,
            "machine": describe_machine(device),
            "written_at": datetime.now(UTC).isoformat(),
        }
        path.write_text(json.dumps({**describe_code(), **about, **content}, indent=1) + "\n", encoding="utf-8")
