"""Training seconds per epoch, side by side: engines, precisions and loaders of this harness, a bare loop, other people's
code.

    python benchmarks/speed.py --data-dir DIR --depths 20,32,56,110 --peer ../peers/pytorch_resnet_cifar10
    python benchmarks/speed.py --data-dir DIR --images 2560 --depths 20 --epochs 10      (two CPU cores)

One process, one device; what counts is a ratio, taken round by round. Every way trains the same network on the same
images with the same recipe and batch of 128, the last one smaller, by its own loop; parameters and steps are asserted.
Warm-up epochs are not timed; set-up (data, network, compilation, capture, first epoch) is shown apart; nothing is
evaluated. --epochs is the number of timed ones of each way, over all rounds; --images of the training images, else all.

By default each of --engines, --precisions and --loaders is varied alone, from the first of each; --all crosses them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers import load_peer, write_images
from rounds import make_table, median_and_range, parse_options, publish, ratio, take_turns

from harness.cluster.job import Worker
from harness.loaders.datasets import Dataset, limit, load_dataset
from harness.loaders.sampling import make_normalize
from harness.models.build import build, count_parameters
from harness.models.variants import find_variant
from harness.spec import RunSpec
from harness.training.host import count_cpus
from harness.training.nvml import Gpu, open_device
from harness.training.setup import assemble, training
from harness.training.step import make_autocast, set_precision, synchronize
from harness.training.train import run_steps

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}  # option A
BATCH = 128
WARMUP_EPOCHS = 2


@dataclass(slots=True)
class Way:
    """One way to train a network; `epochs` trains one at each `next` and yields its seconds."""

    name: str
    depth: int
    engine: str
    precision: Any
    loader: str
    epochs: Generator[float, None, None] | None
    setup_seconds: float = 0.0
    seconds: list[list[float]] = field(default_factory=list)  # by round
    clock_mhz: list[float | None] = field(default_factory=list)  # after each round
    watts: list[float | None] = field(default_factory=list)
    failed: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.engine} {self.precision} {self.loader}"

    def take_turn(self, epochs: int, gpu: Gpu) -> None:
        """Train `epochs` timed epochs, after the warm-up in the first round and after one that refills the caches in others."""
        if self.failed:
            return
        assert self.epochs is not None
        try:
            set_precision(self.precision)  # the flags are the process's: the way before set its own
            began = time.perf_counter()
            next(self.epochs)
            if not self.seconds:
                self.setup_seconds = time.perf_counter() - began
                for _ in range(WARMUP_EPOCHS - 1):
                    next(self.epochs)
            self.seconds.append([next(self.epochs) for _ in range(epochs)])
        except Exception as error:
            self.failed = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            print(f"{self.title}: {self.failed}", file=sys.stderr)
        self.clock_mhz.append(gpu.read("sm_clock_mhz"))
        self.watts.append(gpu.read("power_watts"))

    def close(self) -> None:
        """Free what it trained with."""
        with contextlib.suppress(Exception):
            if self.epochs is not None:
                self.epochs.close()
        self.epochs = None


def ours(spec: RunSpec, dataset: Dataset, worker: Worker) -> Generator[float, None, None]:
    """The harness's own training, by its own code."""
    with closing(
        assemble(spec, dataset, worker, lambda message: warnings.warn(message, stacklevel=2))
    ) as prepared:
        steps = prepared.train_loader.steps
        check(count_parameters(prepared.network), spec.network.depth, steps, len(dataset.train))
        with training(prepared) as trainer:
            for epoch in itertools.count():
                yield run_steps(trainer, epoch=epoch, steps=steps).train_seconds
                if trainer.engine.name != spec.engine:
                    raise RuntimeError(f"engine {spec.engine} does not work here")


def bare(spec: RunSpec, dataset: Dataset, device: torch.device) -> Generator[float, None, None]:
    """What anybody would write in twenty lines, its images as floats on the device and not augmented: a bound."""
    torch.manual_seed(0)
    network = build(spec.network, 10).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    mean = make_normalize("pixel-mean", dataset.train).mean
    x = torch.from_numpy((dataset.train.pixels / 255.0 - mean).astype("float32")).permute(0, 3, 1, 2).to(device)
    y = torch.from_numpy(dataset.train.labels).to(device)
    for epoch in itertools.count():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).to(device)
        synchronize(device)
        began = time.perf_counter()
        for batch in order.split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            with make_autocast(device, spec.precision):
                logits = network(x[batch])
            scaler.scale(F.cross_entropy(logits.float(), y[batch])).backward()
            scaler.step(optimizer)
            scaler.update()
        synchronize(device)
        yield time.perf_counter() - began


def check(parameters: int, depth: int, steps: int, images: int) -> None:
    """Raise AssertionError unless this is the network and the epoch that all others train."""
    assert parameters == PARAMETERS.get(depth, parameters), f"depth {depth} has {parameters} parameters"
    assert steps == -(-images // BATCH), f"{steps} steps of {images} images"


def make_ways(
    depth: int, options: argparse.Namespace, dataset: Dataset, device: torch.device, peer_data: Path
) -> list[Way]:
    """Those of the harness, the bare loop in each precision, and each peer."""
    engines, precisions, loaders = (
        text.split(",") for text in (options.engines, options.precisions, options.loaders)
    )
    chosen = list(itertools.product(engines, precisions, loaders))
    if not options.all:
        first = (engines[0], precisions[0], loaders[0])
        chosen = [c for c in chosen if sum(a != b for a, b in zip(c, first, strict=True)) <= 1]
    worker = Worker(device="cpu" if device.type == "cpu" else "cuda:0", threads=options.threads)
    variant = find_variant("he2015")(depth)
    recipe = replace(variant.recipe, duration=1000, unit="epoch", milestones=(), warmup=0)

    def spec(engine: str, precision: str, loader: str) -> RunSpec:
        return RunSpec(
            variant="he2015", network=variant.network, recipe=recipe, dataset="cifar10", device=device.type,  # type: ignore[arg-type]
            fingerprint=dataset.fingerprint, loader=loader, engine=engine, precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip

    ways = [
        Way("bare loop", depth, "eager", p, "in memory", bare(spec("eager", p, "resident"), dataset, device))
        for p in precisions
    ]
    ways += [Way("harness", depth, *words, ours(spec(*words), dataset, worker)) for words in chosen]
    for peer in map(load_peer, options.peer):
        most = WARMUP_EPOCHS + options.rounds * (1 + -(-options.epochs // options.rounds))
        epochs = peer.epochs(depth, peer_data, device.type, most, BATCH)
        precision = "fp16" if peer.name == "zoo" and device.type == "cuda" else "fp32"
        ways.append(Way(peer.name, depth, "eager", precision, "its own", (epoch["seconds"] for epoch in epochs)))
    return ways


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings; ratios of the rounds' medians, with 95 % intervals."""
    rows, images = [], content["images"]
    for depth in dict.fromkeys(way["depth"] for way in content["readings"]):
        ways = [way for way in content["readings"] if way["depth"] == depth]
        by_round = [[] if way["failed"] else [statistics.median(turn) for turn in way["seconds"]] for way in ways]
        bound = {way["precision"]: s for way, s in zip(ways, by_round, strict=True) if way["name"] == "bare loop"}
        working = [s for way, s in zip(ways, by_round, strict=True)
                   if s and way["name"] == "harness" and way["loader"] != "synthetic"]  # fmt: skip
        best = min(working, key=statistics.median, default=[])
        for way, seconds in zip(ways, by_round, strict=True):
            cells = [depth, way["name"], way["engine"], way["precision"], way["loader"]]
            if not seconds:
                rows.append([*cells, "–", way["failed"], "–", "–", "–"])
                continue
            cells += [f"{way['setup_seconds']:.1f}", median_and_range(seconds, 4)]
            cells.append(f"{images / statistics.median(seconds):,.0f}")
            for base in (bound.get(way["precision"], []), best):
                comparable = len(base) == len(seconds) and base is not seconds
                cells.append(str(ratio(seconds, base)) if comparable else "–")
            rows.append(cells)
    header = ("depth", "way", "engine", "precision", "loader", "set-up s", "s/epoch", "images/s", "/ bare",
              "/ our best")  # fmt: skip
    return make_table(header, rows)


def main() -> None:
    torch.set_flush_denormal(True)  # as in a run
    gpu = torch.cuda.is_available()
    options = parse_options(
        __doc__, data_dir=Path, images=int, all=False, peer=[], rounds=10, epochs=20, threads=count_cpus(),
        depths="20,32,56,110" if gpu else "20", device="cuda" if gpu else "cpu",
        engines="graph,compile,eager" if gpu else "eager,compile", precisions="bf16,fp32,tf32,fp16" if gpu else "fp32,bf16",
        loaders="dali,resident,synthetic,dataloader" if gpu else "dali,resident,synthetic",
    )  # fmt: skip
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(options.threads)
    dataset = load_dataset("cifar10", options.data_dir)
    if options.images is not None:
        dataset = replace(dataset, train=limit(dataset.train, options.images))
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as peer_data:
        if options.peer:
            write_images(
                Path(peer_data), dataset.train, limit(dataset.test, 1000), dataset.classes
            )  # they evaluate
        for depth in map(int, options.depths.split(",")):
            ways = make_ways(depth, options, dataset, device, Path(peer_data))
            turn = (
                -(-options.epochs // options.rounds),
                open_device(device),
            )  # by its UUID: NVML ignores CUDA_VISIBLE_DEVICES
            take_turns({way.title: partial(way.take_turn, *turn) for way in ways}, options.rounds)
            for way in ways:
                way.close()
                entries.append(asdict(way))
            if gpu:
                torch.cuda.empty_cache()
            publish(
                describe, options.json, data=dataset.label, images=len(dataset.train), batch_size=BATCH,
                warmup_epochs=WARMUP_EPOCHS, threads=options.threads, readings=entries,
            )  # fmt: skip


if __name__ == "__main__":
    main()
