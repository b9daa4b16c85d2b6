"""The most that a device can compute, over which MFU is taken: by its data sheet, else measured by matrix products."""

from __future__ import annotations

import json
import time
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from harness.results.store import write_atomic
from harness.spec import Precision
from harness.training.step import set_precision, synchronize
from harness.training.telemetry import device_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # others compute in float32
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices
SECONDS = 0.5
PEAKS = "peaks.json"


class Peak(NamedTuple):
    """FLOP/s of a device in one precision, a multiplication and an addition counting as two, and whose word that is."""

    flops: float
    source: str


@cache
def load_data_sheets() -> dict[tuple[str, str], Peak]:
    """By the device's name and the precision."""
    tables = tomllib.loads(Path(__file__).with_name("devices.toml").read_text(encoding="utf-8"))
    return {
        (name, precision): Peak(1e12 * teraflops, source)
        for source, table in tables.items()
        for name in table.pop("names")
        for precision, teraflops in table.items()
    }


def find_peak(
    device: torch.device, precision: Precision, threads: int, cache: Path, *, fresh: bool = False
) -> Peak:
    """By data sheet; else the best that was measured here, which the cache keeps. `fresh`: measure again."""
    name, file, side = device_name(device), cache / PEAKS, SIDE[device.type]
    if known := load_data_sheets().get((name, precision)):
        return known
    on = f" on {threads} threads" if device.type == "cpu" else ""
    source = f"measured, products of {side} x {side} matrices{on}"
    key, best = f"{name}, {precision}, {source}, torch {torch.__version__}", dict[str, float]()
    with suppress(OSError, ValueError):
        best = json.loads(file.read_bytes())
    if fresh or key not in best:
        best[key] = max(measure_peak(device, precision, side), best.get(key, 0.0))
        with suppress(OSError):  # then the next run measures again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(best, indent=1) + "\n")
    return Peak(best[key], source)


def measure_peak(device: torch.device, precision: Precision, side: int) -> float:
    """FLOP/s of the fastest of the products of two square matrices within SECONDS, three at least."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_precision(precision)
    try:
        factor, product = torch.ones(2, side, side, device=device, dtype=DTYPES.get(precision)) / side
        took, until = list[float](), time.perf_counter() + SECONDS
        while len(took) < 4 or time.perf_counter() < until:
            synchronize(device)
            started_at = time.perf_counter()
            torch.mm(factor, factor, out=product)
            synchronize(device)
            took.append(time.perf_counter() - started_at)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return 2 * side**3 / min(took[1:])  # the first is warm-up
