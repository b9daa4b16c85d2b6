"""How fast devices, nodes and all-reduces are, measured in a few seconds: the peak that MFU is over, and a preflight's figures."""

from __future__ import annotations

import json
import socket
import time
import tomllib
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.cluster.job import Report, Worker
from harness.cluster.workers import gather
from harness.loaders.datasets import Dataset
from harness.loaders.loader import make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, make_normalize
from harness.network import ALL, BETWEEN, WITHIN, find_infiniband, nccl_log, parse_nccl
from harness.results.store import write_atomic
from harness.spec import Precision
from harness.training.host import count_cpus
from harness.training.step import set_precision
from harness.training.telemetry import device_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # others compute in float32
SIDE = {"cuda": 8192, "cpu": 2048}  # of matrices that are multiplied
SECONDS = 0.5  # of products
PEAKS = "peaks.json"
REPEATS, FILE_BYTES, HOST_BYTES = 5, 2**25, 2**27
SMALL_BYTES, SMALL_REPEATS = 8, 100  # of an all-reduce
LARGE_BYTES = {"cuda": 2**26, "cpu": 2**24}


def _fastest(device: torch.device, call: Callable[[], Any], seconds: float = 0.0) -> float:
    """Seconds of the fastest of REPEATS calls, or of all within `seconds`, after one that is not timed."""
    took, until = list[float](), time.perf_counter() + seconds
    while len(took) <= REPEATS or time.perf_counter() < until:
        took.append(_time(device, call))
    return min(took[1:])


def _time(device: torch.device, call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of a call, the device's part included."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


# --- the peak of a device ---


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
    on = f" on {threads} thread{'s' * (threads != 1)}" if device.type == "cpu" else ""
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
    """FLOP/s of the fastest of the products of two square matrices within SECONDS."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_precision(precision)
    try:
        factor, product = torch.ones(2, side, side, device=device, dtype=DTYPES.get(precision)) / side
        return 2 * side**3 / _fastest(device, lambda: torch.mm(factor, factor, out=product), SECONDS)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- a node ---


def measure_rates(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Of this node, by figure and unit, the best of REPEATS or more each: more is better.

    A matrix product in fp32 on the GPU if there is one, else on all processors; copies in the host's memory, and from
    there to the GPU; a file written to `folder` until it is on the disk; the test images through the resident loader.
    """
    torch.set_num_threads(count_cpus())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fastest, images = partial(_fastest, device), len(dataset.test)
    host, target = torch.ones(2, HOST_BYTES, dtype=torch.uint8)
    content, probe = bytes(FILE_BYTES), folder / f".rate-{time.time_ns()}"
    config = LoaderConfig(
        augment=Augment(0, "zero", None, False), normalize=make_normalize("imagenet", dataset.train), batch_size=128,
        eval_batch_size=128, device=device, threads=count_cpus(),
    )  # fmt: skip
    with closing(make_evaluation_loader("resident", dataset.test, config)) as loader:
        rates = {
            "GEMM GFLOP/s": measure_peak(device, "fp32", SIDE[device.type]) / 1e9,
            "memory GB/s": 2 * HOST_BYTES / 1e9 / fastest(lambda: target.copy_(host)),
            "disk MB/s": FILE_BYTES / 1e6 / fastest(lambda: write_atomic(probe, content)),
            "loader images/s": images / fastest(lambda: sum(len(labels) for _, labels in loader.epoch(0))),
        }
    probe.unlink()
    if device.type == "cuda":
        pinned, there = host.pin_memory(), host.to(device)
        rates["host to GPU GB/s"] = HOST_BYTES / 1e9 / fastest(lambda: there.copy_(pinned))
    return rates


# --- all-reduces ---


def measure_network(spec: Any, worker: Worker, report: Report) -> dict[str, Any]:
    """What a launcher calls in every rank: the figures of `measure_all_reduce`, and what NCCL says on each host."""
    with nccl_log() as log:
        measured = measure_all_reduce(worker)
        text = log.read_text(errors="replace") if log is not None and log.is_file() else ""
    said = gather((socket.gethostname(), parse_nccl(text) | {"infiniband": find_infiniband()}))
    hosts = dict(reversed(said))  # as the first rank on each says
    return {"all_reduce": measured} | ({"nccl": hosts} if worker.device != "cpu" else {})


def measure_all_reduce(worker: Worker) -> dict[str, dict[str, float]]:
    """In every rank of a process group: of a small and a large message, within nodes (the slowest), between the first
    ranks of all nodes, and over all workers where that is neither; latency in microseconds, and GB/s.

    The algorithm's bandwidth is bytes over seconds, the bus's 2 (n - 1) / n of that, as nccl-tests has them
    (doc/PERFORMANCE.md).
    """
    nodes, device = gather(worker.node), torch.device(worker.device)
    members = {node: [rank for rank, own in enumerate(nodes) if own == node] for node in dict.fromkeys(nodes)}
    firsts, everyone = [ranks[0] for ranks in members.values()], list(range(len(nodes)))
    ways = {WITHIN: [ranks for ranks in members.values() if len(ranks) > 1], BETWEEN: [firsts][: len(firsts) > 1]}
    if [everyone] not in ways.values():
        ways[ALL] = [everyone]
    figures, size = {}, LARGE_BYTES[device.type]
    for way, groups in ways.items():
        made = [dist.new_group(ranks) for ranks in groups]  # every rank takes part in making each
        took: tuple[float, ...] = ()
        for ranks, group in zip(groups, made, strict=True):
            if worker.rank in ranks:
                latency = _reduce(SMALL_BYTES, SMALL_REPEATS, device, group)
                took = len(ranks), latency, _reduce(size, REPEATS, device, group)
        if every := [one for one in gather(took) if one]:
            n, latency, seconds = max(every, key=itemgetter(2))
            rate = size / 1e9 / seconds
            figures[way] = {
                "ranks": n, "latency_us": 1e6 * latency, "bytes": size, "algorithm_gb_per_s": rate,
                "bus_gb_per_s": rate * 2 * (n - 1) / n,
            }  # fmt: skip
    return figures


def _reduce(size: int, repeats: int, device: torch.device, group: Any) -> float:
    """Seconds of an all-reduce of so many bytes, one after another as nccl-tests has them, after some that are not timed."""
    content = torch.zeros(size // 4, device=device)
    for times in (min(repeats, 5), repeats):
        seconds = _time(device, lambda: dist.all_reduce(content, group=group), times)
    return seconds
