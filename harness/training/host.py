"""A host and its load during a run and an epoch, as its kernel (Linux; elsewhere unknown) and NVML see it.

No torch: the driver of a run imports this too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from harness.results.values import GpuUse, Measurement, NodeUse, measured
from harness.training.nvml import Gpu, open_visible

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
STOPPED_SECONDS, JUMP_SECONDS = 1.0, 1.0
LEAST_SECONDS = 0.25  # of a window in which shares are judged: the kernel counts in hundredths of a second
WAIT_SHARE, OTHERS_SHARE = 0.10, 0.05
"""Of what our threads ran and waited for a processor; of the processors that we may use. On two cores, 104 of 104 epochs that a
load had slowed to twice their seconds showed 0.34 and 0.32 at least; of 25 undisturbed ones none showed above 0.035 and
0.027. The first alone would blame a run that has more threads than processors, the second alone a neighbour on cores that
we do not use."""
QUOTA_SHARE, STEAL_SHARE = 0.10, 0.02
SAMPLED = ("utilisation_percent", "power_watts", "used_mib")  # of nvml.FIGURES
OTHERS = "other processes used the CPU"
CAUSES = (
    "the machine swapped", "the clock was set or the machine slept", "the process was stopped for a while",
    "the CPU quota was used up", "the hypervisor took the CPU", OTHERS,
)  # fmt: skip


def read_table(path: Path) -> dict[str, list[int]]:
    """The whole numbers of each line of a file of the kernel, by the line's first word; empty where it cannot be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
        return {words[0]: [int(word) for word in words[1:] if word.isdecimal()] for words in lines if words}
    return {}


def control_groups() -> Iterator[Path]:
    """The folders of this process's control groups, each before those that it is part of."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            inner = Path(path.lstrip("/"))
            yield from (CGROUPS / controllers / folder for folder in (inner, *inner.parents))


def count_cpus() -> int:
    """CPU cores that this process may use: those of its affinity, and of a container's quota the whole ones."""
    cores = len(os.sched_getaffinity(0))
    for folder in control_groups():
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # of version 2, of version 1
            with contextlib.suppress(OSError, ValueError):  # "max": none
                quota, period = map(int, " ".join((folder / name).read_text() for name in files).split())
                cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores


def family() -> list[int]:
    """This process and its workers (those of a DataLoader)."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def read_ticks() -> tuple[int, int, int]:
    """(busy, all, stolen) clock ticks of all processors since the node started; zeros where they cannot be read."""
    ticks = read_table(PROC / "stat").get("cpu", [])[:8]
    if len(ticks) < 8:
        return 0, 0, 0
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), ticks[7]  # not idle, not waiting for a disk


def read_mib(path: str, name: str) -> float | None:
    """A line of a file in /proc, which is in KiB; None where it cannot be read."""
    kib = read_table(PROC / path).get(name)
    return kib[0] / 1024 if kib else None


def _throttled_seconds() -> float:
    """For how long this process's control group had used its quota up, since it exists. 0 where it has none."""
    for table in (read_table(folder / "cpu.stat") for folder in control_groups()):
        if usec := table.get("throttled_usec"):
            return usec[0] / 1e6
        if nsec := table.get("throttled_time"):
            return nsec[0] / 1e9
    return 0.0


@dataclass(frozen=True, slots=True)
class HostWindow:
    """What one process saw of its host between two looks."""

    host: str
    causes: set[str]  # of CAUSES, but for OTHERS
    wait_share: float | None  # None where the kernel does not count it
    own_seconds: float  # of processors, of this process and its workers
    busy_seconds: float  # of processors, of all processes of the host
    cpu_seconds: float  # of the processors that this process may use; 0 for a window too short to be judged

    def is_disturbed(self, own_seconds: float) -> bool:
        """Whether others used the processors. `own_seconds` are those of all ranks on this host."""
        others = (self.busy_seconds - own_seconds) / self.cpu_seconds if self.cpu_seconds else 0.0
        waited = 2 * others if self.wait_share is None else self.wait_share
        return waited > WAIT_SHARE and others > OTHERS_SHARE


class HostLook:
    """The host at one moment."""

    def __init__(self) -> None:
        self.wall, self.steady, self.process = time.time(), time.monotonic(), time.process_time()
        self.threads: dict[Path, tuple[int, int]] = {}  # nanoseconds on a processor, and waiting for one
        for task in (task for process in family() for task in (PROC / f"{process}/task").glob("*/schedstat")):
            with contextlib.suppress(OSError, ValueError):
                ran, waited, _ = map(int, task.read_text().split())
                self.threads[task] = ran, waited
        self.ticks = read_ticks()
        self.swaps = read_table(PROC / "vmstat").get("pswpin", [])
        self.throttled = _throttled_seconds()

    def until(self, later: HostLook, asleep: float = 0.0) -> HostWindow:
        """The window from this look to a later one of the process, which gave no sign of life for `asleep` seconds."""
        seconds = max(later.steady - self.steady, 1e-9)
        ran, waited = (
            sum(now[i] - self.threads.get(thread, (0, 0))[i] for thread, now in later.threads.items())
            for i in (0, 1)
        )
        busy, every, stolen = (after - before for before, after in zip(self.ticks, later.ticks, strict=True))
        judged = seconds >= LEAST_SECONDS
        seen = (
            later.swaps > self.swaps,
            abs((later.wall - self.wall) - (later.steady - self.steady)) > JUMP_SECONDS,
            asleep > STOPPED_SECONDS,
            judged and later.throttled - self.throttled > QUOTA_SHARE * seconds,
            judged and stolen > STEAL_SHARE * every > 0,
        )
        return HostWindow(
            host=socket.gethostname(),
            causes=set(compress(CAUSES, seen)),
            wait_share=waited / (waited + ran) if ran else None,
            own_seconds=max(later.process - self.process, ran / 1e9),
            busy_seconds=busy / os.sysconf("SC_CLK_TCK"),
            cpu_seconds=seconds * count_cpus() if judged else 0.0,
        )


class Repeat(threading.Thread):
    """Calls `work` now and then every `seconds`, in a thread, until `stop` or until it raises."""

    def __init__(self, work: Callable[[], None], seconds: float) -> None:
        super().__init__(name=work.__qualname__, daemon=True)
        self._work, self._seconds, self._stopping = work, seconds, threading.Event()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(Exception):
            self._work()
            while not self._stopping.wait(self._seconds):
                self._work()

    def stop(self) -> None:
        """End it, waiting a little for work that goes on."""
        self._stopping.set()
        self.join(timeout=1.0)


class NodeTelemetry:
    """Samples a node's GPUs, processors and memory in a thread, from its making until `stop`. It never raises.

    `visible` is CUDA_VISIBLE_DEVICES of the run's workers: "" for no GPU, None for all.
    """

    def __init__(self, visible: str | None, *, interval_seconds: float = 1.0) -> None:
        self._gpus, self._gpus_reason = list[Gpu](), "no GPU was used"
        try:
            self._gpus = open_visible(visible)
        except Exception as error:
            self._gpus_reason = f"NVML: {error}"
        self._joules = [gpu.read("energy_joules") for gpu in self._gpus]
        self._series = [defaultdict[str, list[float]](list) for _ in self._gpus]
        self._memory_mib: list[float] = []
        self._samples = 0
        self._started_at, self._ticks = time.monotonic(), read_ticks()
        self._thread = Repeat(self._sample, interval_seconds)

    def _sample(self) -> None:
        self._samples += 1
        total, available = read_mib("meminfo", "MemTotal"), read_mib("meminfo", "MemAvailable")
        if total is not None and available is not None:
            self._memory_mib.append(total - available)
        for gpu, series in zip(self._gpus, self._series, strict=True):
            for name in SAMPLED:
                if (value := gpu.read(name)) is not None:
                    series[name].append(value)

    def stop(self) -> NodeUse:
        """End the thread and summarise. A GPU's energy is that of the whole window, by NVML's own counter."""
        self._thread.stop()
        busy, every, _ = (now - then for now, then in zip(read_ticks(), self._ticks, strict=True))
        idle = "the run ended before the clock ticked" if self._ticks[1] else "/proc/stat cannot be read here"
        return NodeUse(
            host=socket.gethostname(),
            seconds=time.monotonic() - self._started_at,
            samples=self._samples,
            cpu_percent=measured(100 * busy / every if every > 0 else None, idle),
            memory_peak_mib=measured(max(self._memory_mib, default=None), "/proc/meminfo cannot be read here"),
            gpus=tuple(map(_summarise_gpu, self._gpus, self._series, self._joules)),
            gpus_reason=None if self._gpus else self._gpus_reason,
        )


def _summarise_gpu(gpu: Gpu, series: dict[str, list[float]], joules_before: float | None) -> GpuUse:
    def over(measure: Callable[[list[float]], float], name: str) -> Measurement:
        return measured(measure(series[name]) if series[name] else None, gpu.reason(name))

    joules = gpu.read("energy_joules")
    idle = "NVML's energy counter did not go up" if joules is not None else gpu.reason("energy_joules")
    return GpuUse(
        gpu=gpu.name,
        utilisation_percent=over(statistics.fmean, "utilisation_percent"),
        power_watts=over(statistics.fmean, "power_watts"),
        power_peak_watts=over(max, "power_watts"),
        energy_joules=measured(spent_joules(joules_before, joules), idle),
        memory_peak_mib=over(max, "used_mib"),
    )


def spent_joules(before: float | None, after: float | None) -> float | None:
    """None where the counter was not read, was set back in between, or does not count."""
    return after - before if before is not None and after is not None and after > before else None
