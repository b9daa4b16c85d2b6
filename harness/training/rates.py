"""What a node gives and what an all-reduce between workers costs, measured in a few seconds: the figures of a preflight."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.cluster.job import Report, Worker
from harness.loaders.datasets import Dataset
from harness.loaders.loader import make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, make_normalize
from harness.network import ALL, BETWEEN, WITHIN, find_infiniband, nccl_log, parse_nccl
from harness.results.store import write_atomic
from harness.training.host import count_cpus
from harness.training.step import set_precision
from harness.training.telemetry import gather

REPEATS, FILE_BYTES, HOST_BYTES = 5, 2**25, 2**27
SMALL_BYTES, SMALL_REPEATS = 8, 100  # of an all-reduce
LARGE_BYTES = {"cuda": 2**26, "cpu": 2**24}


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
    config = LoaderConfig(
        augment=Augment(0, "zero", None, False), normalize=make_normalize("imagenet", dataset.train), batch_size=128,
        eval_batch_size=128, device=device, threads=count_cpus(),
    )  # fmt: skip
    with closing(make_evaluation_loader("resident", dataset.test, config)) as loader:
        rates = {
            "GEMM GFLOP/s": 2 * side**3 / 1e9 / _fastest(lambda: matrix @ matrix),
            "memory GB/s": 2 * HOST_BYTES / 1e9 / _fastest(lambda: target.copy_(host)),
            "disk MB/s": FILE_BYTES / 1e6 / _fastest(lambda: write_atomic(probe, content)),
            "loader images/s": len(dataset.test)
            / _fastest(lambda: sum(len(labels) for _, labels in loader.epoch(0))),
        }
    probe.unlink()
    if device.type == "cuda":
        pinned, there = host.pin_memory(), host.to(device)
        rates["host to GPU GB/s"] = HOST_BYTES / 1e9 / _fastest(lambda: there.copy_(pinned))
    return rates


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls, after one that is not timed."""
    return min([_time(call) for _ in range(1 + REPEATS)][1:])


def _time(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of a call, the device's part included."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


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
    ways = {
        WITHIN: [r for r in members.values() if len(r) > 1],
        BETWEEN: [firsts][: len(firsts) > 1],
        ALL: [everyone],
    }
    if [everyone] in (ways[WITHIN], ways[BETWEEN]):
        del ways[ALL]
    figures, size = {}, LARGE_BYTES[device.type]
    for way, groups in ways.items():
        made = [dist.new_group(ranks) for ranks in groups]  # every rank takes part in making each
        took: tuple[float, ...] = ()
        for ranks, group in zip(groups, made, strict=True):
            if worker.rank in ranks:
                took = (
                    len(ranks),
                    _reduce(SMALL_BYTES, SMALL_REPEATS, device, group),
                    _reduce(size, REPEATS, device, group),
                )
        if every := [one for one in gather(took) if one]:
            n, latency, seconds = max(every, key=itemgetter(2))
            figures[way] = {
                "ranks": n, "latency_us": 1e6 * latency, "bytes": size, "algorithm_gb_per_s": size / 1e9 / seconds,
                "bus_gb_per_s": size / 1e9 / seconds * 2 * (n - 1) / n,
            }  # fmt: skip
    return figures


def _reduce(size: int, repeats: int, device: torch.device, group: Any) -> float:
    """Seconds of an all-reduce of so many bytes, one after another as nccl-tests has them, after some that are not timed."""
    content = torch.zeros(size // 4, device=device)
    _time(lambda: dist.all_reduce(content, group=group), min(repeats, 5))
    return _time(lambda: dist.all_reduce(content, group=group), repeats)
