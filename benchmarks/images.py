"""Images in files: images per second and peak memory beside torchvision's own way: python benchmarks/images.py --data-dir DIR

DIR holds train/CLASS/* and test/CLASS/*, or Mini-Places2's kit. The loaders make random-resized crops of the training
images, of a set that links to DIR's files and of one --times as large. `torchvision` is what its reference script does: ImageFolder,
RandomResizedCrop, RandomHorizontalFlip, normalisation, DataLoader with a process per thread. Every reading is a process of
its own: --seconds of loading after 5 batches, and the peak resident memory of it and of its worker processes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rounds import make_table, median_and_range, parse_options, publish, ratio, take_turns

from harness.loaders import datasets
from harness.loaders.datasets import load_dataset
from harness.loaders.loader import make_loaders
from harness.loaders.sampling import IMAGENET_MEAN, IMAGENET_STD, Augment, LoaderConfig, make_normalize

WAYS = ("dali", "dataloader", "torchvision")
WARMUP = 5  # batches


def torchvision_batches(root: Path, options: Any) -> Iterator[torch.Tensor]:
    """Without end."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(options.crop), v2.RandomHorizontalFlip(), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )  # fmt: skip
    workers = 0 if options.threads == 1 else options.threads
    loader = DataLoader(
        ImageFolder(root / "train", transform), options.batch_size, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        yield from (images for images, _ in loader)


def our_batches(way: str, root: Path, options: Any) -> Iterator[torch.Tensor]:
    """Without end, read from files whatever their sizes."""
    datasets.LARGEST_BYTES = 0
    data = load_dataset(f"folder:{root}")
    config = LoaderConfig(
        augment=Augment(0, "zero", options.crop, True, (), options.resize, (0.08, 1.0)),
        normalize=make_normalize("imagenet", data.train), device=torch.device("cpu"),
        batch_size=options.batch_size, eval_batch_size=options.batch_size, threads=options.threads,
    )  # fmt: skip
    train, test = make_loaders(way, data.train, data.test, config)
    test.close()
    for epoch in itertools.count():
        yield from (images for images, _ in train.epoch(epoch))


def measure(way: str, root: Path, options: Any) -> dict[str, float]:
    """Images per second of one way in this process, after some batches, and peak memory in MiB."""
    torch.set_num_threads(options.threads)
    batches = torchvision_batches(root, options) if way == "torchvision" else our_batches(way, root, options)
    for _ in itertools.islice(batches, WARMUP):
        pass
    images, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < options.seconds or not images:
        images += len(next(batches))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    own, *others = (peak_mib(process) for process in ("self", *children))
    return {"images_per_second": images / took, "peak_rss_mib": own, "workers_peak_rss_mib": sum(others)}


def peak_mib(process: str) -> float:
    """Peak resident memory; what processes share counts in each."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure_apart(way: str, root: Path) -> dict[str, float]:
    """The same in a process of its own, with this one's options."""
    command = [sys.executable, *sys.argv, "--way", way, "--root", str(root)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def link(root: Path, copy: Path, times: int) -> Path:
    """A set of `times` links to every training image, and one to every test image. Returns its folder."""
    for split, label, path in list_images(root):
        folder = copy / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(times if split == "train" else 1):
            (folder / f"{number}-{path.name}").symlink_to(path.absolute())
    return copy


def list_images(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Split, class and path of every image."""
    for split, kit in (("train", "train.txt"), ("test", "val.txt")):
        if (root / kit).exists():
            lines = (line.rpartition(" ") for line in (root / kit).read_text().splitlines())
            yield from ((split, f"{int(label):03}", root / "images" / path) for path, _, label in lines)
        else:
            yield from ((split, path.parent.name, path) for path in (root / split).glob("*/*"))


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings."""
    rows, readings = [], content["readings"]
    for name in readings:
        way, times = name.split()
        speeds, peaks, workers = ([each[key] for each in readings[name]] for key in readings[name][0])
        base = [each["images_per_second"] for each in readings[f"torchvision {times}"]]
        compared = "–" if way == "torchvision" else ratio(speeds, base)
        memory = (median_and_range(peaks), median_and_range(workers))
        rows.append([way, f"{content['images'][times]:,}", median_and_range(speeds, 4), compared, *memory])
    return make_table(("loader", "images", "images/s", "/ torchvision", "peak RSS, MiB", "of its workers"), rows)


def main() -> None:
    options = parse_options(
        __doc__, data_dir=Path, times=20, threads=2, batch_size=64, crop=112, resize=128, rounds=10, seconds=3.0, way="",
        root=Path,
    )  # fmt: skip
    if options.way:
        print(json.dumps(measure(options.way, options.root, options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        roots = {times: link(options.data_dir, Path(scratch) / str(times), times) for times in {1, options.times}}
        datasets.LARGEST_BYTES = 0
        images = {str(times): len(load_dataset(f"folder:{root}").train) for times, root in roots.items()}
        ways = {
            f"{way} {times}": partial(measure_apart, way, root) for times, root in roots.items() for way in WAYS
        }
        readings = take_turns(ways, options.rounds)
    settings = {name: getattr(options, name) for name in ("threads", "batch_size", "crop")}
    publish(describe, options.json, readings=readings, images=images, **settings)


if __name__ == "__main__":
    main()
