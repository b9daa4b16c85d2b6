"""What one node does while a run goes on: its GPUs by NVML, its processors and memory by Linux, once a second.

Generic launchers know it as `watch(visible).stop()`: by Ray as one actor a node, without Ray in a thread.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.results.values import GpuUse, Measurement, NodeUse

INTERVAL_SECONDS = 1.0
MIB = 2**20
PROC = Path("/proc")


def watch(visible: str | None) -> Sampler:
    """Start to sample this node. `visible` is CUDA_VISIBLE_DEVICES of the run's workers: "" for none, None for all."""
    return Sampler(visible)


class Sampler:
    """Samples in a thread from when it is made until `stop`. Nothing that NVML or Linux does makes it raise."""

    def __init__(
        self,
        visible: str | None,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        load_nvml: Callable[[], Any] | None = None,
    ) -> None:
        self._gpus: list[_Gpu] = []
        self._reason: str | None = None
        self._samples = 0
        self._memory_mib: list[float] = []
        self._stopped = threading.Event()
        try:
            self._gpus = _open(visible, load_nvml or _load_nvml)
        except Exception as error:
            self._reason = f"NVML: {error}" if visible != "" else str(error)
        self._began, self._cpu = time.monotonic(), _cpu_ticks()
        self._interval_seconds = interval_seconds
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._sample()
            if self._stopped.wait(self._interval_seconds):
                return

    def _sample(self) -> None:
        self._samples += 1
        if (used := _memory_used_mib()) is not None:
            self._memory_mib.append(used)
        for gpu in self._gpus:
            gpu.sample()

    def stop(self) -> NodeUse:
        """End the thread; what it saw. A GPU's energy is that of the whole window, by NVML's own counter."""
        self._stopped.set()
        self._thread.join(timeout=5)
        return NodeUse(
            host=socket.gethostname(),
            seconds=time.monotonic() - self._began,
            samples=self._samples,
            cpu_percent=_share(self._cpu, _cpu_ticks()),
            memory_peak_mib=_reading(max, self._memory_mib, "/proc/meminfo cannot be read here"),
            gpus=tuple(gpu.read() for gpu in self._gpus),
            gpus_reason=self._reason,
        )


def _load_nvml() -> Any:
    import pynvml

    return pynvml


def _open(visible: str | None, load_nvml: Callable[[], Any]) -> list[_Gpu]:
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        raise LookupError("no GPU was used")
    nvml = load_nvml()
    nvml.nvmlInit()
    if visible is None:
        words = [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    else:
        words = [word.strip() for word in visible.split(",")]
    gpus = []
    for word in words:
        if word.isdecimal():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(word))
        else:  # GPU-..., or a MIG device, of which NVML tells less
            handle = nvml.nvmlDeviceGetHandleByUUID(word)
        gpus.append(_Gpu(nvml, handle, word))
    return gpus


class _Gpu:
    """Readings of one GPU so far."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml, self._handle, self._name = nvml, handle, name
        self._utilisation: list[float] = []
        self._watts: list[float] = []
        self._memory_mib: list[float] = []
        self._reasons: dict[str, str] = {}
        self._millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def _ask(self, question: str) -> Any:
        try:
            return getattr(self._nvml, question)(self._handle)
        except Exception as error:
            self._reasons[question] = f"NVML: {error}"
            return None

    def sample(self) -> None:
        if (rates := self._ask("nvmlDeviceGetUtilizationRates")) is not None:
            self._utilisation.append(float(rates.gpu))
        if (milliwatts := self._ask("nvmlDeviceGetPowerUsage")) is not None:
            self._watts.append(milliwatts / 1000)
        if (memory := self._ask("nvmlDeviceGetMemoryInfo")) is not None:
            self._memory_mib.append(memory.used / MIB)

    def read(self) -> GpuUse:
        def told(measure: Callable[[list[float]], float], values: list[float], question: str) -> Measurement:
            return _reading(measure, values, self._reasons.get(question, "never sampled"))

        energy = "nvmlDeviceGetTotalEnergyConsumption"
        now = self._ask(energy)
        joules = [] if now is None or self._millijoules is None else [(now - self._millijoules) / 1000]
        return GpuUse(
            gpu=self._name,
            utilisation_percent=told(statistics.fmean, self._utilisation, "nvmlDeviceGetUtilizationRates"),
            power_watts=told(statistics.fmean, self._watts, "nvmlDeviceGetPowerUsage"),
            power_peak_watts=told(max, self._watts, "nvmlDeviceGetPowerUsage"),
            energy_joules=told(max, joules, energy),
            memory_peak_mib=told(max, self._memory_mib, "nvmlDeviceGetMemoryInfo"),
        )


def _reading(measure: Callable[[list[float]], float], values: list[float], reason: str) -> Measurement:
    return Measurement(value=measure(values)) if values else Measurement(value=None, reason=reason)


def _cpu_ticks() -> tuple[int, int] | None:
    """(busy, all) clock ticks of all processors since the node started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = [int(word) for word in (PROC / "stat").read_text().splitlines()[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle and waiting for a disk
    return None


def _share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> Measurement:
    if before is None or after is None:
        return Measurement(value=None, reason="/proc/stat cannot be read here")
    if after[1] <= before[1]:
        return Measurement(value=None, reason="it was over before the clock ticked")
    return Measurement(value=100 * (after[0] - before[0]) / (after[1] - before[1]))


def _memory_used_mib() -> float | None:
    """Of the whole node: what is not available to new processes."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = (PROC / "meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Mem")}
        return (kib["MemTotal"] - kib["MemAvailable"]) / 1024
    return None
