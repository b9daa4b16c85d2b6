"""What a node gives, measured in a few seconds: the figures of a preflight."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from harness.loaders.datasets import Dataset
from harness.loaders.loader import make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, make_normalize
from harness.results.store import write_atomic
from harness.training.host import count_cpus
from harness.training.step import set_precision

REPEATS, FILE_BYTES, HOST_BYTES = 5, 2**25, 2**27


def measure_rates(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Of this node, by figure and unit, the best of REPEATS each: more is better.

    A matrix product in fp32 on the GPU if there is one, else on all processors; copies in the host's memory, and from
    there to the GPU; a file written to `folder` until it is on the disk; the test images through the resident loader.
    """
    torch.set_num_threads(count_cpus())
    set_precision("fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, device=device)
    host, target = torch.ones(2, HOST_BYTES, dtype=torch.uint8)
    content, probe = bytes(FILE_BYTES), folder / f".rate-{time.time_ns()}"
    rates = {
        "GEMM GFLOP/s": 2 * side**3 / 1e9 / _fastest(lambda: matrix @ matrix),
        "memory GB/s": 2 * HOST_BYTES / 1e9 / _fastest(lambda: target.copy_(host)),
        "disk MB/s": FILE_BYTES / 1e6 / _fastest(lambda: write_atomic(probe, content)),
    }
    probe.unlink()
    if device.type == "cuda":
        pinned, there = host.pin_memory(), host.to(device)
        rates["host to GPU GB/s"] = HOST_BYTES / 1e9 / _fastest(lambda: there.copy_(pinned))
    config = LoaderConfig(
        augment=Augment(0, "zero", None, False), normalize=make_normalize("imagenet", dataset.train), batch_size=128,
        eval_batch_size=128, device=device, threads=count_cpus(),
    )  # fmt: skip
    with closing(make_evaluation_loader("resident", dataset.test, config)) as loader:
        rates["loader images/s"] = len(dataset.test) / _fastest(
            lambda: sum(len(labels) for _, labels in loader.epoch(0))
        )
    return rates


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls, after one that is not timed."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
