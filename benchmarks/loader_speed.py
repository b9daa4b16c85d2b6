"""Images per second of every loader, with nothing to train: python benchmarks/loader_speed.py [--data-dir DIR]

Loaders take turns, A B C A B C, so that whatever else the machine does falls on all alike. One row is one loader
under one normalisation: the median over rounds, its range, and its ratio to PyTorch's DataLoader. CPU time is that
of this process and its threads, per image; DataLoader's worker processes (3 threads or more) are not in it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from harness.loaders.datasets import Split, load_dataset
from harness.loaders.loader import LOADERS, Loader, make_loaders
from harness.loaders.sampling import Augment, LoaderConfig, make_normalize

RECIPES = (
    ("pixel mean, zeros after it", "pixel-mean", "zero"),
    ("colour mean and std, black border", "channel-mean-std", "black"),
    ("colour mean and std, reflected", "channel-mean-std", "reflect"),
)


def measure(loader: Loader, epoch: int, seconds: float, device: torch.device) -> tuple[float, float]:
    """(images per second, CPU microseconds per image) over at least `seconds`, from the 10th batch of `epoch` on."""
    batches = itertools.chain.from_iterable(loader.epoch(number) for number in itertools.count(epoch))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10; without it 50,000 images of noise, as fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each loader in each round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.data_dir:
        split = load_dataset("cifar10", options.data_dir).train
    else:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        split = Split(images, generator.integers(0, 10, 50_000))

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} CPU threads"
    table = Table(
        title=f"{len(split):,} images, batches of {options.batch_size}, {options.rounds} rounds, {where}"
    )
    for column in ("normalisation", "loader", "images/s", "range", "x dataloader", "CPU us/image"):
        table.add_column(column, justify="left" if column in ("normalisation", "loader") else "right")
    for title, kind, pad_mode in RECIPES:
        config = LoaderConfig(
            augment=Augment(4, pad_mode, None, flip=True),
            normalize=make_normalize(kind, split),
            batch_size=options.batch_size,
            eval_batch_size=1000,
            device=device,
            threads=options.threads,
        )
        test = Split(split.images[:1000], split.labels[:1000])
        made = {name: make_loaders(name, split, test, config) for name in LOADERS}
        readings: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
        for number in range(options.rounds):
            for name, (loader, _) in made.items():
                readings[name].append(measure(loader, 1000 * number, options.seconds, device))
        base = median(speed for speed, _ in readings["dataloader"])
        for name, values in readings.items():
            speeds = [speed for speed, _ in values]
            table.add_row(
                title if name == next(iter(LOADERS)) else "",
                name,
                f"{median(speeds):,.0f}",
                f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                f"{median(speeds) / base:.1f}",
                f"{median(cpu for _, cpu in values):.1f}",
            )
        table.add_section()
        for pair in made.values():
            for loader in pair:
                loader.close()
        del made
        gc.collect()
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    main()
