"""What surrounds a run: the machine, each node's load once a second, what disturbed an epoch, the ranks side by side.

No torch at import: the driver of a run imports this too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

from harness.results.values import EpochMetrics, GpuUse, Measurement, Memory, NodeUse, RankUse
from harness.training import host
from harness.training.nvml import Gpu, driver_version, open_device, open_visible

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
SAMPLED = ("utilisation_percent", "power_watts", "used_mib")  # of nvml.FIGURES
CLOCK_SHARE = 0.9  # of the highest SM clock seen in this run
INTERFERENCE = ("another process used the GPU", "the GPU was throttled", "the GPU's clock fell", *host.CAUSES)
"""Why an epoch's seconds are not to be trusted. Such an epoch is kept, named, and left out of the median."""


# --- a node ---


class NodeTelemetry:
    """Samples a node's GPUs, processors and memory in a thread, from its making until `stop`. It never raises.

    `visible` is CUDA_VISIBLE_DEVICES of the run's workers: "" for no GPU, None for all.
    """

    def __init__(self, visible: str | None, *, interval_seconds: float = 1.0) -> None:
        self._gpus: list[Gpu] = []
        self._gpus_reason: str | None = None
        try:
            self._gpus = open_visible(visible)
            self._gpus_reason = None if self._gpus else "no GPU was used"
        except Exception as error:
            self._gpus_reason = f"NVML: {error}"
        self._joules = [gpu.read("energy_joules") for gpu in self._gpus]
        self._series = [defaultdict[str, list[float]](list) for _ in self._gpus]
        self._memory_mib: list[float] = []
        self._samples = 0
        self._started_at, self._ticks = time.monotonic(), host.read_ticks()
        self._thread = host.Repeat(self._sample, interval_seconds)

    def _sample(self) -> None:
        self._samples += 1
        total, available = host.read_mib("meminfo", "MemTotal"), host.read_mib("meminfo", "MemAvailable")
        if total is not None and available is not None:
            self._memory_mib.append(total - available)
        for gpu, series in zip(self._gpus, self._series, strict=True):
            for name in SAMPLED:
                if (value := gpu.read(name)) is not None:
                    series[name].append(value)

    def stop(self) -> NodeUse:
        """End the thread and summarise. A GPU's energy is that of the whole window, by NVML's own counter."""
        self._thread.stop()
        before, after = self._ticks, host.read_ticks()
        idle = "the run ended before the clock ticked" if before and after else "/proc/stat cannot be read here"
        busy, every = (
            (now - then for now, then in zip(after[:2], before[:2], strict=True)) if before and after else (0, 0)
        )
        return NodeUse(
            host=socket.gethostname(),
            seconds=time.monotonic() - self._started_at,
            samples=self._samples,
            cpu_percent=_measured(100 * busy / every if every else None, idle),
            memory_peak_mib=_measured(max(self._memory_mib, default=None), "/proc/meminfo cannot be read here"),
            gpus=tuple(map(_summarise_gpu, self._gpus, self._series, self._joules)),
            gpus_reason=self._gpus_reason,
        )


def _summarise_gpu(gpu: Gpu, series: dict[str, list[float]], joules_before: float | None) -> GpuUse:
    def over(measure: Callable[[list[float]], float], name: str) -> Measurement:
        return _measured(measure(series[name]) if series[name] else None, gpu.reason(name))

    joules = gpu.read("energy_joules")
    idle = "NVML's energy counter did not go up" if joules is not None else gpu.reason("energy_joules")
    return GpuUse(
        gpu=gpu.name,
        utilisation_percent=over(statistics.fmean, "utilisation_percent"),
        power_watts=over(statistics.fmean, "power_watts"),
        power_peak_watts=over(max, "power_watts"),
        energy_joules=_measured(spent_joules(joules_before, joules), idle),
        memory_peak_mib=over(max, "used_mib"),
    )


def spent_joules(before: float | None, after: float | None) -> float | None:
    """None where the counter was not read, was set back in between, or does not count."""
    return after - before if before is not None and after is not None and after > before else None


def _measured(value: float | None, reason: str) -> Measurement:
    """The value, or why there is none."""
    return Measurement(value=value, reason=reason if value is None else None)


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
        spent = spent_joules(self._joules, self._gpu.read("energy_joules"))
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
        clock = self._gpu.read("sm_clock_mhz") or 0.0
        self._highest_clock = max(self._highest_clock, clock)
        processes = self._gpu.processes()  # those of another PID namespace say nothing
        shared, slow = os.getpid() in processes and len(processes) > 1, clock < CLOCK_SHARE * self._highest_clock
        return set(compress(INTERFERENCE, (shared, self._gpu.read("slowdown"), slow)))


# --- the ranks ---


def count_ranks() -> int:
    """Those of the process group; 1 without one. Alone in it, a rank calls no collective: NCCL would set itself up for it."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Item) -> list[Item]:
    """Every rank's value, in order. A collective."""
    import torch.distributed as dist

    if count_ranks() == 1:
        return [value]
    every: list[Any] = [None] * count_ranks()
    dist.all_gather_object(every, value)
    return every


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
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:(.*)", (host.PROC / "cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Host, processor, GPU, driver and the versions of what computes. Taken where the run runs."""
    import torch

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
