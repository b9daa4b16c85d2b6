"""`harness run`'s training on the CPU against a bare PyTorch loop over the same network and an in-memory tensor.

    python benchmarks/cpu.py --data-dir DIR [--images 2560] [--rounds 5]

Rounds are interleaved (bare, dali, resident, synthetic, bare, ...) in one process, so that a busy machine slows all
alike; what counts is the ratio. The bare loop does no augmentation, no evaluation, no bookkeeping: it is a bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.optim import make_optimizer
from harness.run import RunSpec
from harness.train import train_epoch
from loaders.datasets import limit, load_dataset
from loaders.loader import Augment, make_loaders, make_normalize
from models.resnet import build
from models.variants import he2015

LOADERS = ("dali", "resident", "synthetic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=20)
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # as train does
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    dataset = load_dataset("cifar10", args.data_dir)
    images = limit(dataset.train, args.images)
    variant = he2015(args.depth)
    recipe = replace(variant.recipe, duration=args.rounds + 1, unit="epoch")
    normalize = make_normalize("pixel-mean", images)

    def bare() -> Callable[[int], float]:
        """What anybody would write in twenty lines, with the tensors ready."""
        torch.manual_seed(0)
        network = build(variant.network, 10).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
        x = torch.from_numpy((images.images / 255.0 - normalize.mean).astype("float32")).permute(0, 3, 1, 2)
        y = torch.from_numpy(images.labels)

        def epoch(number: int) -> float:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
            began = time.perf_counter()
            for batch in order.split(128):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(network(x[batch]), y[batch]).backward()
                optimizer.step()
            return time.perf_counter() - began

        return epoch

    def ours(kind: str) -> Callable[[int], float]:
        spec = RunSpec(
            variant="he2015", network=variant.network, recipe=recipe, dataset="cifar10",
            fingerprint=dataset.fingerprint, loader=kind, device="cpu",
        )  # fmt: skip
        loader, _ = make_loaders(
            kind, images, images, augment=Augment(4, "zero", None, True), normalize=normalize, batch_size=128,
            eval_batch_size=1000, seed=0, rank=0, world=1, device=device, threads=args.threads, channels_last=True,
        )  # fmt: skip
        torch.manual_seed(0)
        network = build(variant.network, 10).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(recipe, network)
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        def epoch(number: int) -> float:
            return train_epoch(
                network, optimizer, scaler, loader, spec, epoch=number, steps=loader.steps, images=len(images),
                world_size=1, device=device, on_first_step=lambda: None,
            ).train_seconds  # fmt: skip

        return epoch

    ways = {"bare": bare(), **{kind: ours(kind) for kind in LOADERS}}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, epoch in ways.items():
            took = epoch(number)
            if number:  # the first is warm-up
                seconds[name].append(took)
    table = Table(title=f"ResNet-{args.depth}, {args.images} images, {args.threads} threads, {args.rounds} rounds")
    for column in ("way", "s/epoch (median)", "images/s", "ratio to bare, round by round (median)"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, took in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(took, seconds["bare"], strict=True))
        middle = statistics.median(took)
        table.add_row(name, f"{middle:.3f}", f"{args.images / middle:.0f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
