"""Seconds of a step with 1, 2, 4, ... workers, and how much of it is the all-reduce.

    python benchmarks/scaling.py --data-dir DIR [--depths 20,56] [--workers 1,2,4,8] [--engine graph]

strong: the global batch stays 128, as the recipes say. weak: 128 images a worker, another training. Efficiency is the
time of one worker over that of W, by W for the strong form. Rounds are interleaved over all widths. On a CPU every
worker has one thread, whatever the width, so that a second worker is a second core. The all-reduce is timed after
backward, nothing hides it; a step is that of the engine, in which DDP (eager) hides a part of it.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.cluster.launch import Worker
from harness.commands.breakdown import Breakdown, break_down
from harness.commands.report import describe_code
from harness.loaders.datasets import load_dataset
from harness.models.variants import he2015
from harness.spec import RunPaths, RunSpec
from harness.training.telemetry import count_cpus, describe_machine, device_name


def one_rank(rank: int, world: int, port: int, spec: RunSpec, places: RunPaths, out: Any) -> None:
    """Measure as one of `world` ranks; rank 0 tells."""
    gpu = spec.device == "cuda"
    if gpu:
        torch.cuda.set_device(rank)
    torch.set_flush_denormal(True)
    if world > 1:
        dist.init_process_group(
            "nccl" if gpu else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    worker = Worker(rank=rank, world_size=world, device=f"cuda:{rank}" if gpu else "cpu", threads=1)
    found = break_down(spec, worker, print, places=places)
    if rank == 0:
        out.put(found)
    if world > 1:
        dist.destroy_process_group()


def measure(world: int, spec: RunSpec, places: RunPaths) -> Breakdown:
    """A step's parts with `world` ranks of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = mp.get_context("spawn").SimpleQueue()
    mp.start_processes(one_rank, args=(world, port, spec, places, out), nprocs=world, start_method="spawn")
    found: Breakdown = out.get()
    return found


def middle(found: Sequence[Breakdown]) -> tuple[float, float]:
    """Milliseconds of a step, and of its all-reduce: medians over rounds."""
    return (
        statistics.median(one.engine_ms for one in found),
        statistics.median(one.parts.get("all-reduce", 0.0) for one in found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    have = gpus or count_cpus()
    widths = [w for w in (1, 2, 4, 8, 16, 32, 64) if w <= have]
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--depths", default="20")
    parser.add_argument("--workers", default=",".join(map(str, widths)), help=f"up to {have} here")
    parser.add_argument("--engine", default="graph" if gpus else "eager")
    parser.add_argument("--precision", default="bf16" if gpus else "fp32")
    parser.add_argument("--loader", default="resident")
    parser.add_argument("--images", type=int, default=None if gpus else 5120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dataset = load_dataset("cifar10", args.data_dir)
    places = RunPaths(out=Path("unused"), data_dir=args.data_dir and args.data_dir.absolute(), label=dataset.label)
    device = "cuda" if gpus else "cpu"
    console = Console(width=None if sys.stdout.isatty() else 110)
    where = device_name(torch.device(device))
    told: list[dict[str, Any]] = []
    for depth in map(int, args.depths.split(",")):
        variant = he2015(depth)
        asked = [
            (int(w), kind)
            for w in args.workers.split(",")
            for kind in ("strong", "weak")
            if w != "1" or kind == "strong"
        ]
        found: dict[tuple[int, str], list[Breakdown]] = {one: [] for one in asked}
        for number in range(args.rounds):
            for world, kind in asked:
                batch = 128 * world if kind == "weak" else 128
                spec = RunSpec(
                    variant="he2015", network=variant.network, recipe=replace(variant.recipe, batch_size=batch),
                    dataset="cifar10", fingerprint=dataset.fingerprint, limit_train=args.images, limit_test=128,
                    loader=args.loader, engine=args.engine, precision=args.precision, device=device, workers=world,  # type: ignore[arg-type]
                )  # fmt: skip
                found[world, kind].append(measure(world, spec, places))
            console.print(f"depth {depth}: round {number + 1} of {args.rounds}", style="dim")
        table = Table(title=f"ResNet-{depth}, {args.engine}, {args.precision}, {args.loader}, {where}")
        for column in (
            "scaling",
            "workers",
            "batch per worker",
            "ms/step",
            "images/s",
            "efficiency",
            "all-reduce ms",
            "share of step",
        ):
            table.add_column(column, justify="left" if column == "scaling" else "right")
        alone, _ = middle(found[1, "strong"]) if (1, "strong") in found else (float("nan"), 0.0)
        for world, kind in asked:
            step, reduce = middle(found[world, kind])
            batch = 128 * world if kind == "weak" else 128
            efficiency = alone / step if kind == "weak" else alone / step / world
            table.add_row(
                kind if world > 1 else "one worker", str(world), str(batch // world), f"{step:.4g}", f"{1000 * batch / step:,.0f}",
                f"{100 * efficiency:.0f} %", f"{reduce:.3g}" if world > 1 else "–",
                f"{100 * reduce / statistics.median(b.eager_ms for b in found[world, kind]):.0f} %" if world > 1 else "–",
            )  # fmt: skip
            rounds = [
                {"parts": b.parts, "eager_ms": b.eager_ms, "engine_ms": b.engine_ms} for b in found[world, kind]
            ]
            told.append({"depth": depth, "workers": world, "scaling": kind, "batch_size": batch, "rounds": rounds})
        console.print(table)
    if args.json:
        machine = describe_machine(torch.device(device))
        whole = {**describe_code(), "command": sys.argv, "machine": machine, "data": dataset.label, "widths": told}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
