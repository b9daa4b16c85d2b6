"""Milliseconds of a step with 1, 2, 4, ... workers, and how much of it is the all-reduce.

    python benchmarks/scaling.py --data-dir DIR [--depths 20,56] [--workers 1,2,4,8] [--engine graph]

strong: the global batch stays 128, as the recipes say. weak: 128 images a worker, another training. Efficiency is the
time of one worker over that of W, divided by W for the strong form. Rounds are interleaved over all widths. On a CPU every
worker has one thread, whatever the width, so that a second worker is a second core. The all-reduce is timed after
backward, where nothing hides it; a step is that of the engine, in which DDP (eager) hides a part of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rounds import make_table, median_and_range, parse_options, publish, ratio, take_turns

from harness.cluster.job import Worker
from harness.commands.probe import Breakdown, break_down
from harness.loaders.datasets import load_dataset
from harness.models.variants import he2015
from harness.spec import RunPaths, RunSpec
from harness.training.host import count_cpus
from harness.training.telemetry import device_name


def run_rank(rank: int, world: int, folder: str, spec: RunSpec, paths: RunPaths, out: Any) -> None:
    """Measure as one of `world` ranks; rank 0 returns the result through `out`."""
    gpu = spec.device == "cuda"
    if gpu:
        torch.cuda.set_device(rank)
    torch.set_flush_denormal(True)
    if world > 1:
        backend, meeting = "nccl" if gpu else "gloo", f"file://{folder}/rendezvous"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)
    worker = Worker(rank=rank, world_size=world, device=f"cuda:{rank}" if gpu else "cpu", threads=1)
    breakdown = break_down(spec, worker, print, paths=paths)
    if rank == 0:
        out.put(breakdown)
    if world > 1:
        dist.destroy_process_group()


def measure(world: int, spec: RunSpec, paths: RunPaths) -> Breakdown:
    """A step's parts with `world` ranks of this machine."""
    out = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(world, folder, spec, paths, out), nprocs=world)  # type: ignore[attr-defined,no-untyped-call]
    breakdown: Breakdown = out.get()
    return breakdown


def describe(content: dict[str, Any]) -> str:
    """The table of stored readings: a line for each depth, kind of scaling and number of workers."""
    rows = []
    for depth, ways in content["readings"].items():
        milliseconds = {name: [b["engine_ms"] for b in values] for name, values in ways.items()}
        for name, values in ways.items():
            kind, world = name.split()[0], int(name.split()[1])
            batch, step = 128 * world if kind == "weak" else 128, milliseconds[name]
            cells = [depth, kind if world > 1 else "one worker", world, batch // world, median_and_range(step)]
            cells.append(f"{1000 * batch / median(step):,.0f}")
            if world == 1 or "strong 1" not in milliseconds:
                rows.append([*cells, "–", "–", "–"])
                continue
            scale = 1 if kind == "weak" else world
            reduce = [b["parts"].get("all-reduce", 0.0) for b in values]
            share = 100 * median(reduce) / median(b["eager_ms"] for b in values)
            efficiency = ratio(milliseconds["strong 1"], [scale * each for each in step])
            rows.append([*cells, efficiency, f"{median(reduce):.3g}", f"{share:.0f} %"])
    header = ("depth", "scaling", "workers", "batch per worker", "ms/step", "images/s", "efficiency", "all-reduce ms",
              "share of step")  # fmt: skip
    return make_table(header, rows)


def count_workers(words: Sequence[str]) -> list[tuple[str, int]]:
    """Every kind of scaling with every number of workers; one worker is both."""
    return [(kind, int(w)) for w in words for kind in ("strong", "weak") if w != "1" or kind == "strong"]


def main() -> None:
    gpus = torch.cuda.device_count()
    widths = ",".join(str(2**k) for k in range(7) if 2**k <= (gpus or count_cpus()))
    options = parse_options(
        __doc__, data_dir=Path, depths="20", workers=widths, engine="graph" if gpus else "eager", loader="resident",
        precision="bf16" if gpus else "fp32", images=int if gpus else 5120, rounds=10,
    )  # fmt: skip
    dataset = load_dataset("cifar10", options.data_dir)
    paths = RunPaths(
        out=Path("unused"), data_dir=options.data_dir and options.data_dir.absolute(), label=dataset.label
    )
    device = torch.device("cuda" if gpus else "cpu")
    readings = {}
    for depth in map(int, options.depths.split(",")):
        variant = he2015(depth)
        ways = {}
        for kind, world in count_workers(options.workers.split(",")):
            spec = RunSpec(
                variant="he2015", network=variant.network, workers=world, dataset="cifar10", fingerprint=dataset.fingerprint,
                recipe=replace(variant.recipe, batch_size=128 * world if kind == "weak" else 128), loader=options.loader,
                limit_train=options.images, limit_test=128, engine=options.engine, precision=options.precision, device=device.type,  # type: ignore[arg-type]
            )  # fmt: skip
            ways[f"{kind} {world}"] = partial(measure, world, spec, paths)
        turns = take_turns(ways, options.rounds)
        readings[str(depth)] = {name: [asdict(b) for b in values] for name, values in turns.items()}
    publish(
        describe, options.json, device=device_name(device), data=dataset.label, engine=options.engine,
        precision=options.precision, loader=options.loader, readings=readings,
    )  # fmt: skip


if __name__ == "__main__":
    main()
