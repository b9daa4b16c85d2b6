"""Timing in rounds: ways take turns (A B C, A B C, ...), so that whatever else the machine does falls on all alike.

Every reading is kept, and written as JSON beside the conditions.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

Reading = TypeVar("Reading")
ROOT = Path(__file__).resolve().parent.parent


def take_turns(
    ways: Mapping[str, Callable[[], Reading]], rounds: int, *, warmup: int = 0
) -> dict[str, list[Reading]]:
    """Call every way once a round, in turn; readings by way, those of `warmup` rounds before them left out."""
    readings: dict[str, list[Reading]] = {name: [] for name in ways}
    for number in range(-warmup, rounds):
        for name, way in ways.items():
            reading = way()
            if number >= 0:
                readings[name].append(reading)
        print(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up", file=sys.stderr, flush=True)
    return readings


def harness_seconds(*words: object) -> float:
    """Wall time of `harness` with these words in a fresh process, Python's start included."""
    return process_seconds([sys.executable, "-m", "harness.cli", *map(str, words)])


def process_seconds(command: Sequence[str]) -> float:
    """Wall time of a process that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - began


def median_and_range(seconds: Sequence[float]) -> str:
    """ "0.62 s (0.59 to 0.70)" """
    return f"{statistics.median(seconds):.3g} s ({min(seconds):.3g} to {max(seconds):.3g})"


def write_readings(path: Path | None, **content: Any) -> None:
    """Write the readings and what they rest on; nothing without a path."""
    from harness.record import describe_code

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**describe_code(), "command": sys.argv, "written_at": datetime.now(UTC).isoformat(), **content}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
