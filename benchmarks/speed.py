"""Training seconds per epoch, side by side: engines, precisions and loaders of this harness, a bare loop, other people's
code.

    python benchmarks/speed.py --data-dir DIR --depths 20,32,56,110 --peer ../peers/pytorch_resnet_cifar10
    python benchmarks/speed.py --data-dir DIR --images 2560 --depths 20 --epochs 10      (two CPU cores)

One process, one device. The ways take turns (A B C, A B C, ...), so that whatever else the machine does falls on all
alike; what counts is a ratio, taken round by round. Every way trains the same network on the same images with the
same recipe and batch of 128, the last one smaller, by its own loop; parameters and steps are asserted. Warm-up epochs
are not timed; set-up (data, network, compilation, capture, first epoch) is told apart, evaluation is not done.

By default each of --engines, --precisions and --loaders is varied alone, from the first of each; --all crosses them.
The floor is arithmetic for one H200 in bf16: every convolution's tensors moved once at 4.3 TB/s, or its FLOPs at 790
TFLOP/s, whichever takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers import load_peer, write_cifar10
from harness.cluster.job import Worker
from harness.commands.report import describe_code
from harness.loaders.datasets import Dataset, limit, load_dataset
from harness.loaders.sampling import make_normalize
from harness.models.build import build, count_parameters
from harness.models.variants import he2015
from harness.spec import RunSpec
from harness.training.setup import Data, assemble, make_trainer
from harness.training.step import flushed_denormals, make_autocast, set_precision, synchronize
from harness.training.telemetry import count_cpus, describe_machine, device_name
from harness.training.train import run_steps

PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}  # option A
BATCH = 128
WARMUP_EPOCHS = 2
H200_BYTES_PER_SECOND, H200_FLOPS = 4.3e12, 790e12


@dataclass(slots=True)
class Way:
    """One way to train a network; `epochs` trains one at each `next` and gives its seconds."""

    name: str
    depth: int
    engine: str
    precision: str
    loader: str
    epochs: Generator[float, None, None]
    setup_seconds: float = 0.0
    seconds: list[list[float]] = field(default_factory=list)  # by round
    clock_mhz: list[int | None] = field(default_factory=list)  # after each round
    watts: list[float | None] = field(default_factory=list)
    failed: str = ""

    @property
    def all_seconds(self) -> list[float]:
        return [s for round_ in self.seconds for s in round_]


def ours(spec: RunSpec, data: Data, dataset: Dataset, worker: Worker) -> Generator[float, None, None]:
    """The harness's own training, by its own code."""
    made = assemble(spec, data, worker, num_classes=dataset.num_classes, flip=dataset.flip)
    check(count_parameters(made.network), spec.network.depth, made.train_loader.steps, len(data.train))
    trainer = make_trainer(made, lambda message: warnings.warn(message, stacklevel=2))
    for epoch in itertools.count():
        yield run_steps(trainer, epoch=epoch, steps=made.train_loader.steps).train_seconds
        if trainer.engine.name != spec.engine:
            raise RuntimeError(f"engine {spec.engine} does not work here")


def bare(spec: RunSpec, data: Data, device: torch.device) -> Generator[float, None, None]:
    """What anybody would write in twenty lines, its images as floats on the device and not augmented: a bound."""
    set_precision(spec.precision)
    torch.manual_seed(0)
    network = build(spec.network, 10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    mean = make_normalize("pixel-mean", data.train).mean
    x = torch.from_numpy((data.train.images / 255.0 - mean).astype("float32")).permute(0, 3, 1, 2).to(device)
    y = torch.from_numpy(data.train.labels).to(device)
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


def floor_seconds(depth: int, steps: int) -> float:
    """Of an epoch on one H200 in bf16. n blocks a stage, 6n + 1 convolutions; a stage's tensors of one batch hold
    4.19, 2.10 and 1.05 MB. A fused step moves six tensors a convolution and three more a block."""
    n = (depth - 2) // 6
    stage = [BATCH * side * side * width * 2 for side, width in ((32, 16), (16, 32), (8, 64))]
    outputs = stage[0] * (2 * n + 1) + (stage[1] + stage[2]) * 2 * n
    blocks = sum(stage) * n
    # multiply-adds of a 3x3 convolution, 2.36 million in every stage; the first of a stage reads half as many channels
    macs = 9 * 32 * 32 * 16 * 3 + 9 * 32 * 32 * 16 * 16 * 2 * n
    macs += 2 * (9 * 16 * 16 * 32 * 32 * 2 * n - 9 * 16 * 16 * 32 * 16)
    return steps * max((6 * outputs + 3 * blocks) / H200_BYTES_PER_SECOND, 6 * macs * BATCH / H200_FLOPS)


def make_ways(
    depth: int, args: argparse.Namespace, data: Data, dataset: Dataset, device: torch.device
) -> list[Way]:
    """Those of the harness, the bare loop in each precision, and each peer."""
    engines, precisions, loaders = (text.split(",") for text in (args.engines, args.precisions, args.loaders))
    chosen = list(itertools.product(engines, precisions, loaders))
    if not args.all:
        first = (engines[0], precisions[0], loaders[0])
        chosen = [c for c in chosen if sum(a != b for a, b in zip(c, first, strict=True)) <= 1]
    worker = Worker(device="cpu" if device.type == "cpu" else "cuda:0", threads=args.threads)
    variant = he2015(depth)
    recipe = replace(variant.recipe, duration=1000, unit="epoch", milestones=(), warmup=0)

    def spec(engine: str, precision: str, loader: str) -> RunSpec:
        return RunSpec(
            variant="he2015", network=variant.network, recipe=recipe, dataset="cifar10", device=device.type,  # type: ignore[arg-type]
            fingerprint=dataset.fingerprint, loader=loader, engine=engine, precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip

    ways = [
        Way("bare loop", depth, "eager", p, "in memory", bare(spec("eager", p, "resident"), data, device))
        for p in precisions
    ]
    for engine, precision, loader in chosen:
        made = ours(spec(engine, precision, loader), data, dataset, worker)
        ways.append(Way("harness", depth, engine, precision, loader, made))
    for peer in args.peers:
        asked = WARMUP_EPOCHS + args.rounds * (1 + -(-args.epochs // args.rounds))
        epochs = peer.epochs(depth, args.peer_data, device.type, asked, BATCH)
        precision = "fp16" if peer.name == "zoo" and device.type == "cuda" else "fp32"
        ways.append(Way(peer.name, depth, "eager", precision, "its own", (epoch.seconds for epoch in epochs)))
    return ways


def take_turns(ways: Sequence[Way], rounds: int, epochs: int, device: torch.device, console: Console) -> None:
    """`rounds` rounds, in each of which every way trains its share of `epochs`; before them its warm-up."""
    for number in range(rounds):
        for way in ways:
            if way.failed:
                continue
            try:
                if number == 0:
                    began = time.perf_counter()
                    next(way.epochs)
                    way.setup_seconds = time.perf_counter() - began
                    for _ in range(WARMUP_EPOCHS - 1):
                        next(way.epochs)
                else:
                    next(way.epochs)  # what the others left in the caches is not counted
                way.seconds.append([next(way.epochs) for _ in range(-(-epochs // rounds))])
            except Exception as error:
                way.failed = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
                console.print(f"{way.name} {way.engine} {way.precision} {way.loader}: {way.failed}", markup=False)
                continue
            clock, watts = gpu_now(device)
            way.clock_mhz.append(clock)
            way.watts.append(watts)
        console.print(f"depth {ways[0].depth}: round {number + 1} of {rounds}", style="dim")


def gpu_now(device: torch.device) -> tuple[int | None, float | None]:
    """The SM clock in MHz and the power in watts; None on a CPU, or where NVML does not tell."""
    if device.type != "cuda":
        return None, None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return int(pynvml.nvmlDeviceGetClockInfo(handle, 1)), pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:
        return None, None


def ratio(way: Way, base: Way) -> float | None:
    """Seconds over the base's, the median over rounds of the rounds' medians."""
    pairs = list(zip(way.seconds, base.seconds, strict=False))
    if not pairs or way.failed or base.failed:
        return None
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def print_ways(ways: Sequence[Way], images: int, device: torch.device, console: Console) -> None:
    """A table of one depth."""
    depth, steps = ways[0].depth, -(-images // BATCH)
    bound = {way.precision: way for way in ways if way.name == "bare loop"}
    working = [way for way in ways if way.name == "harness" and way.loader != "synthetic" and way.seconds]
    best = min(working, key=lambda way: statistics.median(way.all_seconds), default=None)
    table = Table(title=f"ResNet-{depth}, {images:,} images, {steps} steps of {BATCH}")
    columns = [
        "way",
        "engine",
        "precision",
        "loader",
        "set-up s",
        "s/epoch",
        "IQR",
        "images/s",
        "/ bare",
        "/ our best",
    ]
    on_h200 = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    for column in [*columns, *(["/ floor"] if on_h200 else [])]:
        table.add_column(column, justify="left" if column in columns[:4] else "right")
    for way in ways:
        told = [way.name, way.engine, way.precision, way.loader]
        if way.failed or len(way.all_seconds) < 2:
            table.add_row(*told, "–", "failed")
            continue
        low, middle, high = statistics.quantiles(way.all_seconds, n=4)
        to_bound, to_best = ratio(way, bound[way.precision]) if way.precision in bound else None, None
        if best is not None:
            to_best = ratio(way, best)
        told += [f"{way.setup_seconds:.1f}", f"{middle:.4g}", f"{high - low:.2g}", f"{images / middle:,.0f}"]
        told += ["–" if r is None else f"{r:.3f}" for r in (to_bound, to_best)]
        if on_h200:
            told.append(f"{middle / floor_seconds(depth, steps):.2f}")
        table.add_row(*told, style="bold" if way is best else None)
    console.print(table)


@flushed_denormals()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--data-dir", type=Path, help="the images of CIFAR-10")
    parser.add_argument("--depths", default="20,32,56,110" if gpu else "20")
    parser.add_argument("--engines", default="graph,compile,eager" if gpu else "eager,compile")
    parser.add_argument("--precisions", default="bf16,fp32,tf32,fp16" if gpu else "fp32,bf16")
    parser.add_argument(
        "--loaders", default="dali,resident,synthetic,dataloader" if gpu else "dali,resident,synthetic"
    )
    parser.add_argument("--all", action="store_true", help="every engine x precision x loader")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="other people's code; repeatable")
    parser.add_argument("--images", type=int, help="of the training images; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="timed ones of each way, over all rounds")
    parser.add_argument("--threads", type=int, default=count_cpus())
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--json", type=Path, help="write every reading there, after each depth")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        compare(args, stack)


def compare(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Depth after depth: make the ways, let them take turns, print, write."""
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(args.threads)
    dataset = load_dataset("cifar10", args.data_dir)
    train = dataset.train if args.images is None else limit(dataset.train, args.images)
    data = Data(train, dataset.test, dataset.test, "test")
    console = Console(width=None if sys.stdout.isatty() else 130)
    args.peers = [load_peer(path) for path in args.peer]
    args.peer_data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if args.peers:
        write_cifar10(args.peer_data, train, dataset.test, dataset.classes)
    told: dict[str, Any] = {
        **describe_code(), "command": sys.argv, "machine": describe_machine(device), "data": dataset.label,
        "images": len(train), "batch_size": BATCH, "warmup_epochs": WARMUP_EPOCHS, "threads": args.threads,
        "started_at": datetime.now(UTC).isoformat(), "ways": [],
    }  # fmt: skip
    console.print(f"{device_name(device)}, torch {torch.__version__}, {dataset.label}, {args.threads} CPU threads")
    for depth in map(int, args.depths.split(",")):
        ways = make_ways(depth, args, data, dataset, device)
        take_turns(ways, args.rounds, args.epochs, device, console)
        print_ways(ways, len(train), device, console)
        for way in ways:
            with contextlib.suppress(Exception):
                way.epochs.close()
            entry = {name: getattr(way, name) for name in Way.__slots__ if name != "epochs"}
            told["ways"].append({**entry, "floor_seconds": floor_seconds(depth, -(-len(train) // BATCH))})
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        del ways
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
