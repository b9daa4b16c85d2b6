"""What NCCL says of its network, and what an all-reduce costs by what was measured of it. Imports no torch."""

from __future__ import annotations

import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
Measured = Mapping[str, Mapping[str, float]]  # by way, the figures of `rates.measure_all_reduce`


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
    widths = []
    for workers, seconds in sorted(step_seconds.items()):
        reduce = all_reduce_seconds(measured, workers, size)
        widths.append(Width(workers, seconds, reduce, steps * (seconds + reduce), steps * max(seconds, reduce)))
    return widths


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
