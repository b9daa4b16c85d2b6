"""What surrounds a run: the machine, what disturbed an epoch, the ranks side by side."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch

from harness.cluster.workers import gather
from harness.results.values import EpochMetrics, Memory, RankUse
from harness.training import host
from harness.training.nvml import driver_version, open_device

CLOCK_SHARE = 0.9  # of the highest SM clock seen in this run
INTERFERENCE = ("another process used the GPU", "the GPU was throttled", "the GPU's clock fell", *host.CAUSES)
"""Why an epoch's seconds are not to be trusted. Such an epoch is kept, named, and left out of the median."""


# --- an epoch ---


@dataclass(frozen=True, slots=True)
class EpochReading:
    """What the window of one epoch showed, over all ranks: fields of EpochMetrics."""

    energy_joules: float | None  # of all GPUs; None unless every rank read its own
    interference: tuple[str, ...] = ()  # of any rank
    skew: float | None = None  # slowest over fastest rank's training seconds; None for one rank
    slowest_rank: int | None = None


class EpochTelemetry:
    """Looks at device and host before and after each epoch, and in between at nothing but its own thread's sleep.

    Each rank has a GPU of its own, so the sum over ranks counts every GPU once. Close it.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = open_device(device)
        self._highest_clock = 0.0
        self._alive_at, self._asleep = time.monotonic(), 0.0  # the last sign of life, the longest time without one
        self._thread = host.Repeat(self._live, host.STOPPED_SECONDS / 4)
        self.close = self._thread.stop
        self.start()

    def _live(self) -> None:
        """Give a sign of life: what stops a process stops its threads too."""
        now = time.monotonic()
        self._asleep, self._alive_at = max(self._asleep, now - self._alive_at), now

    def start(self, joules: Sequence[float | None] = (), interference: Iterable[str] = ()) -> None:
        """Open the window; it adds to what an earlier part of the epoch showed."""
        self._earlier = joules, interference
        self._host, self._asleep = host.HostLook(), 0.0
        self._joules = self._gpu.read("energy_joules")

    def stop(self, train_seconds: float) -> EpochReading:
        """Close it, when the device has finished. A collective of all ranks."""
        spent = host.spent_joules(self._joules, self._gpu.read("energy_joules"))
        asleep = max(self._asleep, time.monotonic() - self._alive_at)
        ranks = gather((train_seconds, spent, self._interference(), self._host.until(host.HostLook(), asleep)))
        seconds, every, on_gpus, windows = zip(*ranks, strict=True)
        joules, causes = self._earlier
        every = (*joules, *every)
        found = set(causes).union(*on_gpus, *(window.causes for window in windows))
        for window in windows:
            if window.is_disturbed(sum(other.own_seconds for other in windows if other.host == window.host)):
                found.add(host.OTHERS)
        return EpochReading(
            energy_joules=None if None in every else sum(every),
            interference=tuple(cause for cause in INTERFERENCE if cause in found),
            skew=max(seconds) / min(seconds) if len(seconds) > 1 else None,
            slowest_rank=seconds.index(max(seconds)) if len(seconds) > 1 else None,
        )

    def _interference(self) -> set[str]:
        """Of this rank's GPU."""
        clock = self._gpu.read("sm_clock_mhz") or self._highest_clock  # unread, it has not fallen
        self._highest_clock = max(self._highest_clock, clock)
        processes = self._gpu.read("processes") or {}  # those of another PID namespace say nothing
        shared, slow = os.getpid() in processes and len(processes) > 1, clock < CLOCK_SHARE * self._highest_clock
        return set(compress(INTERFERENCE, (shared, self._gpu.read("slowdown"), slow)))


# --- the ranks ---


def summarise_rank(rank: int, memory: Memory, epochs: Sequence[EpochMetrics]) -> RankUse:
    """What this rank used. `epochs` are this attempt's, as the rank measured them."""
    timed = [row for row in epochs if row.timed]
    return RankUse(
        rank=rank,
        host=socket.gethostname(),
        train_seconds=statistics.median(row.train_seconds for row in timed) if timed else None,
        data_stall_seconds=statistics.median(row.data_stall_seconds for row in timed) if timed else None,
        **{name: getattr(memory, name).value for name in RankUse.model_fields if name in Memory.model_fields},
    )


# --- the machine ---


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:(.*)", (host.PROC / "cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Host, processor, GPU, driver and the versions of what computes. Taken where the run runs."""
    gpu = device.type == "cuda"
    try:
        driver = driver_version() if gpu else None
    except Exception as error:
        driver = f"unknown: {error}"
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": host.count_cpus(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "gpu": device_name(device) if gpu else None,
        "driver": driver,
    }
