"""Images per second of every loader, with nothing to train: python benchmarks/loader_speed.py [--data-dir DIR]

A row is one loader under one normalisation: the median over rounds and its range, and the ratio to PyTorch's DataLoader
with its 95 % interval. CPU time is that of this process and its threads, per image; DataLoader's worker processes (with 3
threads or more) are not included. Without --data-dir: 50,000 images of noise, as fast as CIFAR-10's. --seconds: of each
loader in each round.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import make_table, median_and_range, parse_options, publish, ratio, take_turns

from harness.loaders.datasets import Split, load_dataset
from harness.loaders.loader import LOADERS, Loader, make_loaders
from harness.loaders.sampling import Augment, LoaderConfig, NormalizeKind, PadMode, make_normalize

RECIPES: tuple[tuple[str, NormalizeKind, PadMode], ...] = (
    ("pixel mean, zeros after it", "pixel-mean", "zero"),
    ("colour mean and std, black border", "channel-mean-std", "black"),
    ("colour mean and std, reflected", "channel-mean-std", "reflect"),
)


def measure(
    loader: Loader, epochs: itertools.count[int], seconds: float, device: torch.device
) -> tuple[float, float]:
    """(images per second, CPU microseconds per image) over at least `seconds`, after the first 10 batches."""
    batches = itertools.chain.from_iterable(loader.epoch(number) for number in epochs)
    for _ in itertools.islice(batches, 10):
        pass
    images, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _, labels in itertools.islice(batches, 10):
            images += len(labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    return images / elapsed, (time.process_time() - cpu) / images * 1e6


def load_split(data_dir: Path | None) -> Split:
    """CIFAR-10's training images, or as many of noise."""
    if data_dir:
        return load_dataset("cifar10", data_dir).train
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    return Split(images, generator.integers(0, 10, 50_000))


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    rows = []
    for title, loaders in content["readings"].items():
        base = [speed for speed, _ in loaders["dataloader"]]
        for name, readings in loaders.items():
            speeds, cpu = ([reading[i] for reading in readings] for i in (0, 1))
            compared = "–" if name in ("dataloader", "synthetic") else ratio(speeds, base)
            rows.append([title, name, median_and_range(speeds, 4), compared, median_and_range(cpu)])
    return make_table(("normalisation", "loader", "images/s", "/ dataloader", "CPU µs/image"), rows)


def main() -> None:
    gpu = torch.cuda.is_available()
    options = parse_options(
        __doc__, data_dir=Path, threads=2, batch_size=128, rounds=10, seconds=1.0, device="cuda" if gpu else "cpu"
    )
    torch.set_num_threads(options.threads)
    device, split = torch.device(options.device), load_split(options.data_dir)
    few = Split(split.images[:1000], split.labels[:1000])
    readings = {}
    for title, kind, pad_mode in RECIPES:
        config = LoaderConfig(
            augment=Augment(4, pad_mode, None, flip=True), normalize=make_normalize(kind, split), device=device,
            batch_size=options.batch_size, eval_batch_size=1000, threads=options.threads,
        )  # fmt: skip
        with ExitStack() as stack:
            ways = {}
            for name in LOADERS:
                train, _ = map(stack.enter_context, map(closing, make_loaders(name, split, few, config)))
                ways[name] = partial(measure, train, itertools.count(), options.seconds, device)
            readings[title] = take_turns(ways, options.rounds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} CPU threads"
    publish(
        describe, options.json, readings=readings, device=where, images=len(split), batch_size=options.batch_size
    )


if __name__ == "__main__":
    main()
