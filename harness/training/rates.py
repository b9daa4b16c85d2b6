"""How fast devices, nodes and all-reduces are, measured in a few seconds: the peak that MFU is over, a preflight's figures,
what NCCL says of its network, and how far a run scales by all that."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import socket
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.cluster.job import Report, Worker
from harness.cluster.workers import gather
from harness.loaders.datasets import Dataset
from harness.loaders.loader import make_evaluation_loader
from harness.loaders.sampling import Augment, LoaderConfig, make_normalize
from harness.results.store import write_atomic
from harness.spec import Precision
from harness.training.host import count_cpus
from harness.training.step import DTYPES, set_precision
from harness.training.telemetry import device_name

SIDE = {"cuda": 8192, "cpu": 2048}  # of matrices that are multiplied
SECONDS = 0.5  # of products
PEAKS = "peaks.json"
REPEATS, FILE_BYTES, HOST_BYTES = 5, 2**25, 2**27
SMALL_BYTES, SMALL_REPEATS = 8, 100  # of an all-reduce
LARGE_BYTES = {"cuda": 2**26, "cpu": 2**24}
NCCL_LOG = ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE")
NCCL_SAYS = {  # in 2.18 to 2.28: src/init.cc, src/plugin/net.cc, src/graph/topo.cc, src/transport/net*.cc, src/misc/param.cc
    "version": r"NCCL version (\d[\d.]*)",
    "network": r"(?:Using network|Assigned NET plugin) (.+?)(?: to comm)?$",
    "devices": r"NET/\S+ : Using (\[\d.*?)(?: ?; ?OOB .*)?$",
    "gpu_direct_rdma": r"NET/\S+ : GPU Direct RDMA (.+)$",
    "channels": r"\] via (NET/.+)$",
    "settings": r"(NCCL_(?:IB|NET|SOCKET)\S* set (?:by environment )?to .*?)\.?$",
}
INFINIBAND = Path("/sys/class/infiniband")
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes: DDP's
LEAST_EFFICIENCY = 0.5
WITHIN, BETWEEN, ALL = "within nodes", "between nodes", "all workers"
Said = dict[str, list[str]]
Measured = Mapping[str, Mapping[str, float]]  # by way, the figures of `measure_all_reduce`


def _fastest(device: torch.device, call: Callable[[], Any], seconds: float = 0.0) -> float:
    """Seconds of the fastest of REPEATS calls, or of all within `seconds`, after one that is not timed: others may use a node."""
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


def instant(device: torch.device) -> Any:
    """When the device comes to this point of its queue, for `seconds_between`; on the CPU by the kernel's raw clock."""
    if device.type == "cpu":
        return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(before: Any, after: Any) -> float:
    """Of two instants that the device has come to."""
    return after - before if isinstance(before, float) else float(before.elapsed_time(after)) / 1000


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
    """FLOP/s of the fastest of the products of two square matrices within SECONDS; leaves the precision set."""
    set_precision(precision)
    factor, product = torch.ones(2, side, side, device=device, dtype=DTYPES.get(precision)) / side
    return 2 * side**3 / _fastest(device, lambda: torch.mm(factor, factor, out=product), SECONDS)


# --- a node ---


def measure_rates(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Of this node, by figure and unit, the best of REPEATS or more each: more is better.

    A matrix product in fp32 on the GPU if there is one, else on all processors; copies in the host's memory, and from
    there to the GPU; a file written to `folder` until it is on the disk; the test images through the resident loader.
    """
    torch.set_num_threads(count_cpus())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fastest = partial(_fastest, device)
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
            "loader images/s": len(dataset.test) / fastest(lambda: [None for _ in loader.epoch(0)]),
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
        if not groups:
            continue
        group: Any = dist.new_subgroups_by_enumeration(groups)[0]  # every rank takes part in making each
        took: tuple[Any, ...] = ()
        if group is not None:
            latency = _reduce(SMALL_BYTES, SMALL_REPEATS, device, group)
            took = _reduce(size, REPEATS, device, group), latency, group.size()
        seconds, latency, n = max(gather(took))  # the slowest
        rate = size / 1e9 / seconds
        figures[way] = {
            "ranks": n, "latency_us": 1e6 * latency, "bytes": size, "algorithm_gb_per_s": rate,
            "bus_gb_per_s": rate * 2 * (n - 1) / n,
        }  # fmt: skip
    return figures


def _reduce(size: int, repeats: int, device: torch.device, group: Any) -> float:
    """Seconds of an all-reduce of so many bytes, one after another as nccl-tests has them, after some that are not timed."""
    reduce = partial(dist.all_reduce, torch.zeros(size // 4, device=device), group=group)
    return [_time(device, reduce, times) for times in (min(repeats, 5), repeats)][-1]


# --- NCCL's network ---


@contextmanager
def nccl_log() -> Iterator[Path | None]:
    """Where NCCL, as long as this process has not used it yet, writes what it says of its network; None where the user
    has it write elsewhere."""
    if any(name in os.environ for name in NCCL_LOG):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nccl-") as folder:
        os.environ.update(zip(NCCL_LOG, ("INFO", "INIT,ENV,NET", f"{folder}/log"), strict=True))
        yield Path(folder, "log")


def parse_nccl(text: str) -> Said:
    """What a process's log says, each thing once: NCCL's version, the network ("IB", "Socket", a plug-in's name), its
    devices, whether GPUs send by them directly, what channels between nodes go by, variables that choose."""
    return {what: list(dict.fromkeys(re.findall(says, text, re.MULTILINE))) for what, says in NCCL_SAYS.items()}


def find_infiniband(root: Path = INFINIBAND) -> list[str]:
    """This host's active ports: "mlx5_0:1, InfiniBand at 200 Gb/sec (4X HDR)"."""
    found = []
    for port in sorted(root.glob("*/ports/*")):
        state, rate, layer = ((port / name).read_text().strip() for name in ("state", "rate", "link_layer"))
        if "ACTIVE" in state:
            found.append(f"{port.parents[1].name}:{port.name}, {layer} at {rate}")
    return found


def find_idle_infiniband(hosts: Mapping[str, Said]) -> list[str]:
    """A line where NCCL uses sockets between hosts of which one has an active InfiniBand port. `hosts`: what `parse_nccl`
    found on each, and `find_infiniband` as "infiniband"."""
    idle = [said for said in hosts.values() if said["network"] == ["Socket"] and said["infiniband"]]
    if not idle or len(hosts) == 1:
        return []
    said = idle[0]
    disabled = [line for line in said["settings"] if re.match(r"NCCL_IB_DISABLE.* [^0]\S*$", line)]
    why = disabled[0] if disabled else "NCCL_DEBUG=INFO says why"
    by = f"NCCL uses sockets ({', '.join(said['devices'])}) on {len(idle)} of {len(hosts)} nodes"
    return [f"{by}, though InfiniBand is active there ({said['infiniband'][0]}): {why}"]


# --- how far a run scales ---


class Width(NamedTuple):
    """What is predicted of a run with so many workers."""

    workers: int
    step_seconds: float  # without the all-reduce, measured of one worker with its share of the batch
    reduce_seconds: float  # of a step
    apart: float  # seconds of an epoch where the all-reduce follows each step's computation
    hidden: float  # and where it is hidden behind it as far as it can be


def all_reduce_seconds(measured: Measured, workers: int, size: int) -> float:
    """Of a gradient of `size` bytes over so many workers, in DDP's buckets: each waits for the latency that was measured,
    and its bytes take their time by the bus bandwidth (a ring's 2 (n - 1) / n of them pass each link: nccl-tests,
    doc/PERFORMANCE.md). Within a node as far as its workers go."""
    within = measured.get(WITHIN, {"ranks": 0})
    way = within if workers <= within["ranks"] else measured.get(ALL) or measured.get(BETWEEN) or within
    buckets = 1 + math.ceil(max(0, size - FIRST_BUCKET) / BUCKET)
    once = buckets * way["latency_us"] / 1e6 + 2 * (workers - 1) / workers * size / 1e9 / way["bus_gb_per_s"]
    return once if workers > 1 else 0.0


def predict_widths(steps: int, size: int, step_seconds: Mapping[int, float], measured: Measured) -> list[Width]:
    """By `step_seconds`, of one worker that has its share of the batch among so many workers."""
    each = ((n, step, all_reduce_seconds(measured, n, size)) for n, step in sorted(step_seconds.items()))
    return [Width(n, step, wait, steps * (step + wait), steps * max(step, wait)) for n, step, wait in each]


def efficiencies(widths: Sequence[Width], bound: str) -> list[float]:
    """Beside the fewest workers, where the all-reduce is "apart" or "hidden"."""
    alone = widths[0].workers * getattr(widths[0], bound)
    return [alone / width.workers / getattr(width, bound) for width in widths]


def find_limit(widths: Sequence[Width], bound: str) -> tuple[int, str]:
    """How many workers pay off, and why no more: the next width is no faster, or less than LEAST_EFFICIENCY efficient."""
    for (before, width), share in zip(itertools.pairwise(widths), efficiencies(widths, bound)[1:], strict=True):
        if getattr(width, bound) >= getattr(before, bound):
            return before.workers, f"{width.workers} are no faster"
        if share < LEAST_EFFICIENCY:
            return before.workers, f"{width.workers} are {100 * share:.0f} % efficient"
    return widths[-1].workers, "no more were measured"
