"""How much memory a run takes at its peak, and what holds it."""

from __future__ import annotations

import ctypes
import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor, nn

from harness.results.values import MEMORY_CATEGORIES, Measurement, Memory, measured
from harness.training.host import PROC, family, read_mib
from harness.training.nvml import MIB, open_device

NO_GPU = Measurement(value=None, reason="no GPU was used")
UNSAMPLED = Measurement(value=None, reason="never sampled")

_kept_mib: dict[tuple[str, int], float] = {}
"""What a process keeps from run to run, by category and device: the CUDA context, as it was first measured; as much as the
buffers of NCCL and of DALI were seen to take."""


class MemoryMeter:
    """Peaks since the last `reset`, which belongs after set-up and after warm-up, and who holds how much.

    Make it before anything else of the run touches the device. The process may have a CUDA context by then, of an
    earlier run or of Ray, and memory in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self._gpu = open_device(device)
        self._outside = defaultdict[str, float](float)  # of torch's allocator, by category
        self._tensors = defaultdict[str, float](float)  # in it
        self._in_use: list[float] = []
        self._workers_mib = 0.0  # their largest sample
        self._others: float | None = 0.0  # MiB of other processes; None where it cannot be known
        self._process = UNSAMPLED
        no_epoch = Measurement(value=None, reason="there was no epoch after warm-up")
        self._warmup = dict.fromkeys(("allocated", "reserved"), no_epoch if self.on_gpu else NO_GPU)
        gc.collect()  # what an earlier run in this process left
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # and what it left in the allocator
        self._peak_is_own = False
        with suppress(OSError):
            (PROC / "self/clear_refs").write_text("5")  # begin with a peak of what is resident now: Linux 4.0
            self._peak_is_own = True
        if self.on_gpu:
            self._open()
        else:
            self._outside["process at its start"] = self._outside_torch()

    def _open(self) -> None:
        """Tell the context and other processes apart, and begin with no peaks."""
        index = self.device.index or 0
        existed = torch._C._cuda_hasPrimaryContext(index)
        if existed:
            torch.cuda.empty_cache()
        before = self._gpu.read("used_mib")
        torch.zeros(1, device=self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        reserved, own = self._torch("memory_reserved"), self._gpu.process_mib().value
        self._listed = own is not None  # else what earlier runs left looks like another process's
        used, context = self._gpu.read("used_mib"), ("CUDA context", index)
        if own is None and not existed and before is not None and used is not None:
            own = used - before
        elif own is None and context in _kept_mib:
            own = reserved + _kept_mib[context]
        if own is None or used is None:
            self._others = None
        else:
            self._others = used - own
            self._outside["CUDA context"] = _kept_mib.setdefault(context, own - reserved)

    def _torch(self, figure: str) -> float:
        """MiB by torch's own counter of this name; 0 on the CPU."""
        return float(getattr(torch.cuda, figure)(self.device)) / MIB if self.on_gpu else 0.0

    def _own_mib(self) -> float | None:
        """Memory of this process on the GPU; None where it cannot be known."""
        own, used = self._gpu.process_mib().value, self._gpu.read("used_mib")
        if own is None and used is not None and self._others is not None:
            own = used - self._others  # right where no other process began or ended on this GPU
        return own

    def _outside_torch(self) -> float:
        """MiB of it that torch's allocator does not hold: context, DALI's pools, NCCL's buffers. On the CPU all."""
        own = self._own_mib() if self.on_gpu else read_mib("self/status", "VmRSS")
        return 0.0 if own is None else own - self._torch("memory_reserved")

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """What comes into use inside belongs to `name`, one of MEMORY_CATEGORIES."""
        before, allocated = self._outside_torch(), self._torch("memory_allocated")
        yield
        self._tensors[name] += self._torch("memory_allocated") - allocated
        if self.on_gpu or name != "NCCL":  # gloo, in its place, has next to nothing
            self._outside[name] += max(0.0, self._outside_torch() - before)

    def reset(self) -> None:
        """Set-up or warm-up is over: keep its peaks apart, and take what else was loaded until now for kernels. The host's
        peak is that of the whole run."""
        self._in_use.clear()
        if self.on_gpu:
            for name in ("data loader", "NCCL") if self._listed else ():
                key = name, self.device.index or 0
                self._outside[name] = _kept_mib[key] = max(self._outside[name], _kept_mib.get(key, 0.0))
            if "CUDA context" in self._outside:
                claimed = sum(mib for name, mib in self._outside.items() if name != "kernels")
                self._outside["kernels"] = max(0.0, self._outside_torch() - claimed)
            self._warmup = {name: larger(self._warmup[name], peak) for name, peak in self._peaks().items()}
            torch.cuda.reset_peak_memory_stats(self.device)
            self._process = UNSAMPLED

    def _peaks(self, captured_mib: float = 0.0) -> dict[str, Measurement]:
        """torch's own. A captured graph holds what it computes in a pool that torch counts as reserved alone."""
        if not self.on_gpu:
            return dict.fromkeys(self._warmup, NO_GPU)
        return {
            "allocated": Measurement(value=self._torch("max_memory_allocated") + captured_mib),
            "reserved": Measurement(value=self._torch("max_memory_reserved")),
        }

    def sample(self) -> None:
        """After each epoch, since NVML knows no peak of the past, and a worker process may end."""
        workers = sum(read_mib(f"{process}/smaps_rollup", "Pss") or 0.0 for process in family()[1:])
        self._workers_mib = max(self._workers_mib, workers)
        self._process = larger(self._process, self._gpu.process_mib())
        self._in_use.append(self._torch("memory_reserved") + self._outside_torch())

    def read(self, network: nn.Module, optimizer: torch.optim.Optimizer, captured_bytes: int = 0) -> Memory:
        """The peaks, in MiB, and by category; `captured_bytes` are those of CUDA graphs."""
        growth = None
        if len(self._in_use) >= 3:  # by least squares
            growth = linear_regression(range(len(self._in_use)), self._in_use).slope
        self.sample()
        peaks, peak = self._peaks(captured_bytes / MIB), read_mib("self/status", "VmHWM")
        rss = Measurement(value=None, reason="/proc/self/status cannot be read here")
        if peak is not None:
            reason = None if self._peak_is_own else "of the whole process: its peak cannot be reset here"
            rss = Measurement(value=peak + self._workers_mib, reason=reason)

        def mib(tensors: Iterable[Any]) -> float:
            return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)) / MIB

        sizes = {
            "weights": mib([*network.parameters(), *network.buffers()]),
            "gradients": mib(p for p in network.parameters() if p.requires_grad),
            "optimizer state": mib(value for state in optimizer.state.values() for value in state.values()),
        }
        owned = {name: self._outside[name] + self._tensors[name] for name in {*self._outside, *self._tensors}}
        total, categories = rss.value, defaultdict(float, owned | sizes)
        if self.on_gpu:
            allocated, reserved = peaks["allocated"].value or 0.0, peaks["reserved"].value or 0.0
            categories["activations"] = allocated - sum(sizes.values()) - sum(self._tensors.values())
            categories["allocator slack"] = reserved - allocated
            total = self._own_mib() if self._process.value is None else self._process.value
        else:
            categories["data loader"] += self._workers_mib
        categories["unaccounted"] = (total or 0.0) - sum(categories.values())
        known = MEMORY_CATEGORIES if total is not None else ()
        return Memory(
            torch_allocated_mib=peaks["allocated"],
            torch_reserved_mib=peaks["reserved"],
            nvml_process_mib=self._process,
            rss_mib=rss,
            warmup_allocated_mib=self._warmup["allocated"],
            warmup_reserved_mib=self._warmup["reserved"],
            growth_mib_per_epoch=measured(growth, "fewer than three epochs after warm-up"),
            by_category_mib={name: categories[name] for name in known if categories.get(name)},
        )


def larger(one: Measurement, other: Measurement) -> Measurement:
    """The one with the larger value; `other` where `one` has none."""
    return one if one.value is not None and one.value >= (other.value or 0.0) else other


def largest(ranks: list[Memory]) -> Memory:
    """The peak of each figure over the ranks; by category, that of the rank that used most."""
    most = max(ranks, key=lambda rank: rank.nvml_process_mib.value or rank.rss_mib.value or 0.0)
    names = [name for name in Memory.model_fields if name != "by_category_mib"]
    peaks = {name: reduce(larger, (getattr(rank, name) for rank in ranks)) for name in names}
    return Memory(**peaks, by_category_mib=most.by_category_mib)
