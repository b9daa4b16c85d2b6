"""Where time and memory go, and on what machine. What cannot be read here is null with its reason, never 0."""

from __future__ import annotations

import os
import platform
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any, TypeVar

from harness.results.values import MEMORY_CATEGORIES, Measurement, Memory

if TYPE_CHECKING:
    import torch
    from torch import nn

MIB = 2**20
Item = TypeVar("Item")


def count_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def count_gpus() -> int:
    """GPUs that this process may use: NVML's, less what CUDA_VISIBLE_DEVICES hides. Needs no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (visible.strip() in ("", "-1", "NoDevFiles")):
        return 0
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        count = int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
    return count if visible is None else min(count, len(visible.split(",")))


def synchronize(device: torch.device) -> None:
    """Wait for what this caller's stream was given, not for what a loader makes ahead on its own."""
    if device.type == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()


class Waiting:
    """Iterate over a loader and add up the seconds in which it kept its caller waiting."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items."""
        iterator = iter(items)
        while True:
            asked_at = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - asked_at
            yield item


class MemoryMeter:
    """Peaks since the last `reset`, which belongs after warm-up, and who holds how much.

    Make it before anything else touches the device: what a GPU uses then belongs to others.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._categories: dict[str, float] = {}
        self._in_use: list[float] = []
        self._owned_tensors = 0.0
        self._nvml = _NvmlProcess(device.index or 0) if device.type == "cuda" else None
        self._others = 0.0
        reason = "no GPU was used" if self._nvml is None else "there was no epoch after warm-up"
        self._warmup = (Measurement(value=None, reason=reason),) * 2  # allocated, reserved
        if self._nvml is None:
            self._categories["process at its start"] = _resident_mib()
        else:
            import torch

            self._others = _nvml_used(device.index or 0) or 0.0
            torch.zeros(1, device=device)
            self._categories["CUDA context"] = self._outside_torch()

    def _outside_torch(self) -> float:
        """MiB of the GPU in use, by this process and since it began, that torch's allocator does not hold."""
        import torch

        used = _nvml_used(self.device.index or 0)
        return 0.0 if used is None else used - self._others - torch.cuda.memory_reserved(self.device) / MIB

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What comes into use inside belongs to `name`, one of MEMORY_CATEGORIES."""
        if self._nvml is None:
            before = _resident_mib()
            yield
            if name == "NCCL":  # gloo is there in its place, and has next to nothing
                return
            self._categories[name] = self._categories.get(name, 0.0) + max(0.0, _resident_mib() - before)
            return
        import torch

        before, allocated = self._outside_torch(), torch.cuda.memory_allocated(self.device) / MIB
        yield
        tensors = torch.cuda.memory_allocated(self.device) / MIB - allocated
        self._categories[name] = (
            self._categories.get(name, 0.0) + max(0.0, self._outside_torch() - before) + tensors
        )
        self._owned_tensors += tensors

    def reset(self) -> None:
        """Warm-up is over: keep its peaks apart. The host's peak is the process's own and cannot be reset."""
        self._in_use.clear()
        if self._nvml is not None:
            import torch

            allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
            self._warmup = (
                Measurement(value=allocated(self.device) / MIB),
                Measurement(value=reserved(self.device) / MIB),
            )
            torch.cuda.reset_peak_memory_stats(self.device)
            self._nvml.peak = None

    def sample(self) -> None:
        """NVML tells what is used now, so it is asked after each epoch."""
        if self._nvml is None:
            self._in_use.append(_resident_mib())
        else:
            import torch

            self._nvml.sample()
            self._in_use.append(torch.cuda.memory_reserved(self.device) / MIB + self._outside_torch())

    def read(
        self, network: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, graphs: Any = None
    ) -> Memory:
        """The peaks, in MiB. With the network and its optimizer, by category too; `graphs` has `reserved_bytes`."""
        rss = Measurement(value=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB)
        growth = _slope(self._in_use)
        if self._nvml is None:
            none = Measurement(value=None, reason="no GPU was used")
            return Memory(
                torch_allocated_mib=none, torch_reserved_mib=none, nvml_process_mib=none, rss_mib=rss,
                warmup_allocated_mib=self._warmup[0], warmup_reserved_mib=self._warmup[1],
                growth_mib_per_epoch=growth, by_category_mib=self._by_category(rss.value, _sizes(network, optimizer)),
            )  # fmt: skip
        import torch

        captured = getattr(graphs, "reserved_bytes", 0) / MIB
        allocated = torch.cuda.max_memory_allocated(self.device) / MIB
        reserved = torch.cuda.max_memory_reserved(self.device) / MIB
        process = self._nvml.read()
        total = process.value
        if total is None and (used := _nvml_used(self.device.index or 0)) is not None:
            total = used - self._others  # right where nobody else began or ended on this GPU
        sizes = _sizes(network, optimizer)
        if sizes:
            # a captured graph holds its activations and gradients in a pool that torch counts as reserved alone
            kept = sum(sizes.values()) + self._owned_tensors
            rest = allocated + captured - kept
            sizes |= {"activations": rest, "allocator slack": reserved - allocated - captured}
        return Memory(
            torch_allocated_mib=Measurement(value=allocated + captured),
            torch_reserved_mib=Measurement(value=reserved),
            nvml_process_mib=process,
            rss_mib=rss,
            warmup_allocated_mib=self._warmup[0],
            warmup_reserved_mib=self._warmup[1],
            growth_mib_per_epoch=growth,
            by_category_mib=self._by_category(total, sizes),
        )

    def _by_category(self, total: float | None, sizes: dict[str, float]) -> dict[str, float]:
        if total is None or not sizes:
            return {}
        categories = self._categories | sizes
        categories["unaccounted"] = total - sum(categories.values())
        return {name: categories[name] for name in MEMORY_CATEGORIES if categories.get(name)}


def _sizes(network: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """MiB of the network's weights (and statistics), its gradients and the optimizer's state."""
    if network is None or optimizer is None:
        return {}

    def mib(tensors: Iterable[torch.Tensor]) -> float:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB

    return {
        "weights": mib([*network.parameters(), *network.buffers()]),
        "gradients": mib(p for p in network.parameters() if p.requires_grad),
        "optimizer state": mib(v for state in optimizer.state.values() for v in state.values() if v is not None),
    }


def _slope(in_use: list[float]) -> Measurement:
    """MiB an epoch by least squares, from three epochs on."""
    if len(in_use) < 3:
        return Measurement(value=None, reason="fewer than three epochs after warm-up")
    return Measurement(value=linear_regression(range(len(in_use)), in_use).slope)


def _resident_mib() -> float:
    """Resident memory of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB
    except (OSError, ValueError, IndexError):
        return 0.0


def _nvml_used(index: int) -> float | None:
    """MiB of torch's GPU `index` in use by all its processes."""
    handle = _nvml_handle(index)
    if handle is None:
        return None
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / MIB
    except Exception:
        return None


INTERFERENCE = (
    "another process used the GPU",
    "the GPU was throttled",
    "the GPU's clock fell",
    "the machine swapped",
    "the clock was set or the machine slept",
)
"""Why an epoch's seconds are not to be trusted. Such an epoch is kept, named, and left out of the median."""

_SLOWDOWN = 0x08 | 0x20 | 0x40 | 0x80  # NVML's reasons: hardware, software thermal, hardware thermal, power brake
_CLOCK_SHARE = 0.9  # of the highest SM clock seen in this run


@dataclass(frozen=True, slots=True)
class Watched:
    """What one window saw: energy in joules of this rank's own GPU (None: not told), and which INTERFERENCE."""

    joules: float | None
    interference: tuple[str, ...]


class Watch:
    """Look at the device and the host around a timed window; nothing is asked inside it.

    Each rank has a GPU of its own, so the sum over ranks counts every GPU once.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._highest_clock = 0
        if device.type == "cuda":
            self._handle = _nvml_handle(device.index or 0)
        self.begin()

    def begin(self) -> None:
        """Open the window."""
        self._swapped = _pages_swapped()
        self._clocks = (time.time(), time.monotonic())
        self._millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def end(self) -> Watched:
        """Close it. Call after the device was waited for."""
        joules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        if joules is not None and self._millijoules is not None:
            joules = (joules - self._millijoules) / 1000
        else:
            joules = None
        wall, steady = time.time() - self._clocks[0], time.monotonic() - self._clocks[1]
        swapped = _pages_swapped()
        seen = (
            self._others_on_gpu(),
            bool((self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0) & _SLOWDOWN),
            self._clock_fell(),
            swapped is not None and self._swapped is not None and swapped > self._swapped,
            abs(wall - steady) > 1.0,
        )
        return Watched(joules, tuple(name for name, yes in zip(INTERFERENCE, seen, strict=True) if yes))

    def _ask(self, question: str, *arguments: Any) -> Any:
        """NVML's answer about the GPU, None where it has none: every reading is optional."""
        if self._handle is None:
            return None
        import pynvml

        try:
            return getattr(pynvml, question)(self._handle, *arguments)
        except Exception:
            return None

    def _others_on_gpu(self) -> bool:
        pids = {process.pid for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ()}
        return os.getpid() in pids and len(pids) > 1  # in another PID namespace nothing can be said

    def _clock_fell(self) -> bool:
        clock = self._ask("nvmlDeviceGetClockInfo", 1) or 0  # 1: NVML_CLOCK_SM
        self._highest_clock = max(self._highest_clock, clock)
        return clock < _CLOCK_SHARE * self._highest_clock


def _pages_swapped() -> int | None:
    """Pages the machine has swapped in since it started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("pswpin "))
    except (OSError, StopIteration, ValueError):
        return None


def _nvml_handle(index: int) -> Any:
    """NVML's handle of torch's GPU `index`, which CUDA_VISIBLE_DEVICES may have renumbered; None without NVML."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception:
        return None


class _NvmlProcess:
    """Memory of this process on one GPU as NVML counts it: CUDA context, DALI's pools and NCCL's buffers too."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.peak: float | None = None
        self.reason = "never sampled"

    def sample(self) -> None:
        import pynvml

        handle = _nvml_handle(self.index)
        if handle is None:
            self.reason = "NVML cannot be asked here"
            return
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            used = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
        except Exception as error:
            self.reason = f"NVML: {error}"
            return
        if not used:
            self.reason = "NVML does not list this process (another PID namespace, as in containers)"
        elif used[0] is None:
            self.reason = "NVML does not tell the memory of processes here"
        else:
            self.peak = max(self.peak or 0.0, used[0] / MIB)

    def read(self) -> Measurement:
        self.sample()
        return Measurement(value=self.peak, reason=None if self.peak is not None else self.reason)


def largest(readings: Iterable[Memory]) -> Memory:
    """The peak of each figure over the ranks; by category, that of the rank that used most."""
    ranks = list(readings)
    most = max(ranks, key=lambda rank: rank.nvml_process_mib.value or rank.rss_mib.value or 0.0)

    def peak(name: str) -> Measurement:
        read = [getattr(rank, name) for rank in ranks]
        values = [r.value for r in read if r.value is not None]
        return Measurement(value=max(values)) if values else read[0]

    figures = {
        name: peak(name) for name in Memory.model_fields if name.endswith("_mib") and name != "by_category_mib"
    }
    return Memory(**figures, by_category_mib=most.by_category_mib)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Host, processor, GPU, driver and the versions of what computes. Taken where the run runs."""
    import torch

    machine: dict[str, Any] = {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": count_cpus(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "gpu": None,
        "driver": None,
    }
    if device.type == "cuda":
        machine["gpu"] = device_name(device)
        try:
            import pynvml

            pynvml.nvmlInit()
            machine["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        except Exception as error:
            machine["driver"] = f"unknown: {error}"
    return machine
