"""NVML, the driver's own counters: the one wrapper around it. What it does not give is None, with a reason."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness.results.values import Measurement, measured

if TYPE_CHECKING:
    import torch

MIB = 2**20
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU
SLOWDOWN = 0x08 | 0x20 | 0x40 | 0x80  # hardware, software thermal, hardware thermal, power brake
FIGURES: dict[str, Callable[[Any, Any], Any]] = {
    "energy_joules": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,
    "power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "utilisation_percent": lambda nvml, gpu: float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
    "used_mib": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / MIB,
    "sm_clock_mhz": lambda nvml, gpu: float(nvml.nvmlDeviceGetClockInfo(gpu, 1)),
    "slowdown": lambda nvml, gpu: float(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & SLOWDOWN),
    "model": lambda nvml, gpu: nvml.nvmlDeviceGetName(gpu),
    "processes": lambda nvml, gpu: {
        p.pid: p.usedGpuMemory and p.usedGpuMemory / MIB for p in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    },
}
"""How NVML is asked for a figure: "NVIDIA H200" for the model, process id -> MiB for the processes, None where it does not
give them."""


class Gpu:
    """One GPU, or one MIG instance of it. Reading it never raises."""

    def __init__(self, nvml: Any, handle: Any, name: str, reason: str = "never read") -> None:
        self.name = name
        self._nvml, self._handle = nvml, handle
        self._reason = reason
        self._reasons: dict[str, str] = {}

    def read(self, figure: str) -> Any:
        """One of FIGURES, now; None where NVML does not say."""
        if self._handle is None:
            return None
        self._reasons.pop(figure, None)
        try:
            return FIGURES[figure](self._nvml, self._handle)
        except Exception as error:
            self._reasons[figure] = f"NVML: {error}"
            return None

    def reason(self, figure: str) -> str:
        """Why `read` gave None."""
        return self._reasons.get(figure, self._reason)

    def process_mib(self) -> Measurement:
        """Memory of this process: with the CUDA context, DALI's pools and NCCL's buffers."""
        processes, reason = self.read("processes"), "NVML does not give the memory of processes here"
        if processes is None:
            reason = self.reason("processes")
        elif os.getpid() not in processes:
            reason = "NVML does not list this process (another PID namespace, as in containers)"
        return measured((processes or {}).get(os.getpid()), reason)


def load_nvml() -> Any:
    """The initialised module. Raises ImportError or pynvml.NVMLError where there is none."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def open_gpu(name: str) -> Gpu:
    """The GPU that CUDA_VISIBLE_DEVICES calls so: by index, or by UUID, which may be cut short, or be a MIG instance's. Raises
    what NVML raises."""
    nvml = load_nvml()
    by_index, by_uuid = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
    if name.isdecimal():
        return Gpu(nvml, by_index(int(name)), name)
    try:
        return Gpu(nvml, by_uuid(name), name)
    except Exception:
        for gpu in map(by_index, range(nvml.nvmlDeviceGetCount()) if name.startswith("GPU-") else ()):
            if str(nvml.nvmlDeviceGetUUID(gpu)).startswith(name):
                return Gpu(nvml, gpu, name)
        raise


def open_device(device: torch.device) -> Gpu:
    """The GPU behind a device of torch's, by its UUID; where NVML is of no use, one that gives reasons alone."""
    if device.type != "cuda":
        return Gpu(None, None, str(device), "no GPU was used")
    index, reason = device.index or 0, ""
    try:
        import torch

        uuid = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-").removeprefix("MIG-")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        # of a MIG instance CUDA may give the UUID of the whole GPU
        named = [name.strip() for name in visible[index : index + 1] if name.strip().startswith("MIG-")]
        for name in (*named, f"GPU-{uuid}", f"MIG-{uuid}"):
            try:
                return open_gpu(name)
            except Exception as error:
                reason = reason or f"NVML: {error}"
    except Exception as error:
        reason = f"NVML: {error}"
    return Gpu(None, None, str(device), reason)


def open_visible(visible: str | None) -> list[Gpu]:
    """The GPUs named by a value of CUDA_VISIBLE_DEVICES; all of them for None. Raises what NVML raises."""
    if visible is not None and visible.strip() in HIDDEN:
        return []
    if visible is None:
        visible = ",".join(str(index) for index in range(load_nvml().nvmlDeviceGetCount()))
    return [open_gpu(name.strip()) for name in visible.split(",") if name.strip()]


def count_gpus() -> int:
    """GPUs that this process may use: NVML's, less what CUDA_VISIBLE_DEVICES hides. Needs no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in HIDDEN:
        return 0
    count = 0
    with contextlib.suppress(Exception):
        nvml = load_nvml()
        try:
            count = int(nvml.nvmlDeviceGetCount())
        finally:
            nvml.nvmlShutdown()
    if visible is None:
        return count
    named = visible.split(",")  # of MIG instances a GPU has several
    of_mig = all(name.strip().startswith("MIG-") for name in named)
    return len(named) if count and of_mig else min(count, len(named))


def driver_version() -> str:
    """Of NVIDIA's driver. Raises what NVML raises."""
    return str(load_nvml().nvmlSystemGetDriverVersion())


def cuda_driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver runs. Raises what NVML raises."""
    number = int(load_nvml().nvmlSystemGetCudaDriverVersion_v2())
    return number // 1000, number % 1000 // 10
