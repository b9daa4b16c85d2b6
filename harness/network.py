"""What NCCL says of its network, and what an all-reduce costs by what was measured of it. Imports no torch."""

from __future__ import annotations

import itertools
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

NCCL_LOG = ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE")
INFINIBAND = Path("/sys/class/infiniband")
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes: DDP's
LEAST_EFFICIENCY = 0.5
WITHIN, BETWEEN, ALL = "within nodes", "between nodes", "all workers"
Measured = Mapping[str, Mapping[str, float]]  # by way, the figures of `rates.measure_all_reduce`

# Lines of NCCL 2.18 to 2.28: src/init.cc, src/plugin/net.cc, src/graph/topo.cc, src/transport/net*.cc, src/misc/param.cc
_PREFIX = re.compile(r".*?NCCL (?:INFO )?(?=NCCL version|version|Using network|Assigned NET|NET/|NCCL_|Channel)")
_NETWORK = re.compile(r"(?:Using network|Assigned NET plugin) (.+?)(?: to comm)?$")
_DEVICE = re.compile(r"\[\d+\](\S+)")
_RDMA = re.compile(r"NET/\S+ : GPU Direct RDMA .*?(Enabled|Disabled) for HCA \d+ '([^']*)'")
_CHANNEL = re.compile(r"\[(?:send|receive)\] via (NET/[^/]+)/\S*?(/GDRDMA)?(?:\(PCI\))?(?:/Shared)?$")
_SETTING = re.compile(
    r"(NCCL_(?:IB_DISABLE|IB_HCA|NET|SOCKET_IFNAME|NET_GDR_LEVEL)) set (?:by environment )?to (.*?)\.?$"
)


# --- NCCL's network ---


@contextmanager
def nccl_log() -> Iterator[Path | None]:
    """Where NCCL, as long as this process has not used it yet, writes what it says of its network; None where the user
    has it write elsewhere."""
    if any(name in os.environ for name in NCCL_LOG):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nccl-") as folder:
        os.environ |= dict(zip(NCCL_LOG, ("INFO", "INIT,ENV,NET", f"{folder}/log"), strict=True))
        yield Path(folder, "log")


def parse_nccl(text: str) -> dict[str, Any]:
    """What a process's log says: NCCL's version, its network ("IB", "Socket", a plug-in's name), that network's devices,
    whether GPUs send by it directly, variables that choose it, and what the channels between nodes go by."""
    said: dict[str, Any] = {
        "version": None,
        "network": None,
        "devices": [],
        "gpu_direct_rdma": {},
        "settings": {},
        "channels": {},
    }
    for line in text.splitlines():
        words = _PREFIX.sub("", line, count=1).strip()
        if match := re.search(r"NCCL version (\S+?)(?:\+|$)", line):
            said["version"] = match[1]
        elif match := _NETWORK.match(words):
            said["network"] = match[1]
        elif match := _RDMA.match(words):
            said["gpu_direct_rdma"][match[2]] = match[1] == "Enabled"
        elif match := _SETTING.match(words):
            said["settings"][match[1]] = match[2]
        elif match := _CHANNEL.search(words):
            way = match[1] + (match[2] or "")
            said["channels"][way] = said["channels"].get(way, 0) + 1
        elif words.startswith("NET/") and " : Using " in words:
            said["devices"] += [
                f"{words.split()[0]} {device}" for device in _DEVICE.findall(words.split("OOB")[0])
            ]
    said["devices"] = [each for each in said["devices"] if each.startswith(f"NET/{said['network']} ")] or said[
        "devices"
    ]
    return said


def find_infiniband(root: Path = INFINIBAND) -> dict[str, str]:
    """This host's active ports of InfiniBand devices, "mlx5_0:1" -> "200 Gb/sec (4X HDR) InfiniBand"."""
    found = {}
    for port in sorted(root.glob("*/ports/*")):
        state, rate, layer = (
            path.read_text().strip() if (path := port / name).is_file() else ""
            for name in ("state", "rate", "link_layer")
        )
        if "ACTIVE" in state:
            found[f"{port.parents[1].name}:{port.name}"] = f"{rate} {layer}".strip()
    return found


def find_idle_infiniband(by_host: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line where NCCL uses sockets though a host has an active InfiniBand device. `by_host`: what `parse_nccl` found
    there, with the ports as "infiniband"."""
    idle = {host: said for host, said in by_host.items() if said["network"] == "Socket" and said["infiniband"]}
    for host, said in idle.items():
        port, rate = next(iter(said["infiniband"].items()))
        disabled = said["settings"].get("NCCL_IB_DISABLE", "0") not in ("", "0")
        why = "NCCL_IB_DISABLE is set" if disabled else "NCCL_DEBUG=INFO says why"
        by = ", ".join(device.split()[1] for device in said["devices"])
        others = f" and {len(idle) - 1} other nodes" if len(idle) > 1 else ""
        return [
            f"NCCL uses sockets ({by}) on {host}{others}, though InfiniBand {port} is active there at {rate}: {why}"
        ]
    return []


# --- how far a run scales ---


def all_reduce_seconds(measured: Measured, workers: int, size: int) -> float:
    """Of a gradient of `size` bytes over so many workers, in DDP's buckets: each waits for the latency that was measured,
    and its bytes take their time by the bus bandwidth (a ring's 2 (n - 1) / n of them pass each link: nccl-tests,
    doc/PERFORMANCE.md). Within a node as far as its workers go."""
    if workers == 1:
        return 0.0
    within = measured.get(WITHIN, {})
    way = within if workers <= within.get("ranks", 0) else measured.get(ALL) or measured.get(BETWEEN) or within
    buckets = 1 + math.ceil(max(0, size - FIRST_BUCKET) / BUCKET)
    return buckets * way["latency_us"] / 1e6 + 2 * (workers - 1) / workers * size / 1e9 / way["bus_gb_per_s"]


class Width(NamedTuple):
    """A run with so many workers, as predicted: seconds of an epoch."""

    workers: int
    step_seconds: float  # without the all-reduce, measured at this many images a worker
    reduce_seconds: float  # of a step
    apart: float  # an epoch, where the all-reduce follows each step's computation
    hidden: float  # and where it is hidden behind it as far as it can be

    def efficiency(self, alone: Width) -> tuple[float, float]:
        """Of the two, beside the fewest workers."""
        fewer = alone.workers / self.workers
        return fewer * alone.apart / self.apart, fewer * alone.hidden / self.hidden


def predict_widths(steps: int, size: int, step_seconds: Mapping[int, float], measured: Measured) -> list[Width]:
    """By `step_seconds`, of one worker that has its share of the batch among so many workers."""
    widths = []
    for workers, seconds in sorted(step_seconds.items()):
        reduce = all_reduce_seconds(measured, workers, size)
        widths.append(Width(workers, seconds, reduce, steps * (seconds + reduce), steps * max(seconds, reduce)))
    return widths


def find_limit(widths: list[Width], bound: int) -> tuple[int, str]:
    """How many workers pay, in the one bound (0: apart) or the other (1: hidden), and why no more: the next width is less
    than LEAST_EFFICIENCY efficient, or no faster."""
    for before, width in itertools.pairwise(widths):
        if width[3 + bound] >= before[3 + bound]:
            return before.workers, f"{width.workers} are no faster"
        if (share := width.efficiency(widths[0])[bound]) < LEAST_EFFICIENCY:
            return before.workers, f"{width.workers} are {100 * share:.0f} % efficient"
    return widths[-1].workers, "no more were measured"
