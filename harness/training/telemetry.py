"""What surrounds a run: the machine, each node's load once a second, what disturbed an epoch, the ranks side by side.

No torch at import: the driver of a run imports this too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from harness.results.values import EpochMetrics, GpuUse, Measurement, Memory, NodeUse, RankUse
from harness.training import host
from harness.training.nvml import Gpu, driver_version, open_device, open_visible

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
INTERVAL_SECONDS = 1.0
SAMPLED = ("utilisation_percent", "power_watts", "used_mib")  # of nvml.FIGURES
CLOCK_SHARE = 0.9  # of the highest SM clock seen in this run
INTERFERENCE = ("another process used the GPU", "the GPU was throttled", "the GPU's clock fell", *host.CAUSES)
"""Why an epoch's seconds are not to be trusted. Such an epoch is kept, named, and left out of the median."""


# --- a node ---


class NodeTelemetry:
    """Samples a node's GPUs, processors and memory in a thread, from its making until `stop`. It never raises.

    `visible` is CUDA_VISIBLE_DEVICES of the run's workers: "" for no GPU, None for all.
    """

    def __init__(self, visible: str | None, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        self._gpus: list[Gpu] = []
        self._gpus_reason: str | None = None
        try:
            self._gpus = open_visible(visible)
        except Exception as error:
            hidden = isinstance(error, LookupError) and visible == ""
            self._gpus_reason = str(error) if hidden else f"NVML: {error}"
        self._joules = [gpu.read("energy_joules") for gpu in self._gpus]
        self._series: list[dict[str, list[float]]] = [{name: [] for name in SAMPLED} for _ in self._gpus]
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
            for figure, values in series.items():
                if (value := gpu.read(figure)) is not None:
                    values.append(value)

    def stop(self) -> NodeUse:
        """End the thread and summarise. A GPU's energy is that of the whole window, by NVML's own counter."""
        self._thread.stop()
        return NodeUse(
            host=socket.gethostname(),
            seconds=time.monotonic() - self._started_at,
            samples=self._samples,
            cpu_percent=_busy_percent(self._ticks, host.read_ticks()),
            memory_peak_mib=_summarise(max, self._memory_mib, "/proc/meminfo cannot be read here"),
            gpus=tuple(map(_summarise_gpu, self._gpus, self._series, self._joules)),
            gpus_reason=self._gpus_reason,
        )


def _summarise_gpu(gpu: Gpu, series: dict[str, list[float]], joules_before: float | None) -> GpuUse:
    def over(measure: Callable[[list[float]], float], figure: str) -> Measurement:
        return _summarise(measure, series[figure], gpu.reason(figure))

    joules = gpu.read("energy_joules")
    spent = spent_joules(joules_before, joules)
    idle = "NVML's energy counter did not go up" if joules is not None else gpu.reason("energy_joules")
    return GpuUse(
        gpu=gpu.name,
        utilisation_percent=over(statistics.fmean, "utilisation_percent"),
        power_watts=over(statistics.fmean, "power_watts"),
        power_peak_watts=over(max, "power_watts"),
        energy_joules=Measurement(value=spent, reason=idle if spent is None else None),
        memory_peak_mib=over(max, "used_mib"),
    )


def spent_joules(before: float | None, after: float | None) -> float | None:
    """None where the counter was not read, was set back in between, or does not count."""
    return after - before if before is not None and after is not None and after > before else None


def _summarise(measure: Callable[[list[float]], float], values: list[float], reason: str) -> Measurement:
    return Measurement(value=measure(values)) if values else Measurement(value=None, reason=reason)


def _busy_percent(before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> Measurement:
    if before is None or after is None:
        return Measurement(value=None, reason="/proc/stat cannot be read here")
    busy, every = after[0] - before[0], after[1] - before[1]
    reason = None if every else "the run ended before the clock ticked"
    return Measurement(value=100 * busy / every if every else None, reason=reason)


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

    def start(self) -> None:
        """Open the window."""
        self._host, self._asleep = host.HostLook(), 0.0
        self._joules = self._gpu.read("energy_joules")

    def stop(self, train_seconds: float) -> EpochReading:
        """Close it, when the device has finished. A collective of all ranks."""
        spent = spent_joules(self._joules, self._gpu.read("energy_joules"))
        asleep = max(self._asleep, time.monotonic() - self._alive_at)
        ranks = gather((train_seconds, spent, self._interference(), self._host.until(host.HostLook(), asleep)))
        seconds, every, on_gpus, windows = zip(*ranks, strict=True)
        found = set[str]().union(*on_gpus, *(window.causes for window in windows))
        for window in windows:
            if window.is_disturbed(sum(other.own_seconds for other in windows if other.host == window.host)):
                found.add(host.OTHERS)
        joules = [own for own in every if own is not None]
        return EpochReading(
            energy_joules=sum(joules) if len(joules) == len(every) else None,
            interference=tuple(cause for cause in INTERFERENCE if cause in found),
            skew=max(seconds) / min(seconds) if len(seconds) > 1 else None,
            slowest_rank=seconds.index(max(seconds)) if len(seconds) > 1 else None,
        )

    def _interference(self) -> set[str]:
        """Of this rank's GPU."""
        clock = self._gpu.read("sm_clock_mhz") or 0.0
        self._highest_clock = max(self._highest_clock, clock)
        processes = self._gpu.processes()  # those of another PID namespace say nothing
        seen = (
            os.getpid() in processes and len(processes) > 1,
            bool(self._gpu.read("slowdown")),
            clock < CLOCK_SHARE * self._highest_clock,
        )
        return {cause for cause, there in zip(INTERFERENCE, seen, strict=False) if there}


# --- the ranks ---


def gather(value: Item) -> list[Item]:
    """Every rank's value, in order. A collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
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
    with contextlib.suppress(OSError, StopIteration):
        lines = (host.PROC / "cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Host, processor, GPU, driver and the versions of what computes. Taken where the run runs."""
    import torch

    gpu = device.type == "cuda"
    driver = None
    if gpu:
        try:
            driver = driver_version()
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
