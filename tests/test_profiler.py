"""Measurements against a stand-in for NVML: units, reasons, interference. No GPU is needed, none is used."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from harness.results.values import Measurement, Memory
from harness.training import profiler

GPU = torch.device("cuda", 0)


class Nvml:
    """One GPU: 250 J spent by each question about energy, this process on it."""

    def __init__(self) -> None:
        self.millijoules, self.reasons, self.clock = 1_000_000, 0, 1980
        self.pids = [os.getpid()]
        self.NVMLError = RuntimeError

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.millijoules += 250_000
        return self.millijoules

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return self.clock

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=3 * 2**30) for pid in self.pids]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    made = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid="1234"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def test_joules_are_the_counters_difference(nvml: Nvml) -> None:
    watch = profiler.Watch(GPU)
    watch.begin()
    assert watch.end() == profiler.Watched(250.0, ())


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"pids": [os.getpid(), 1]}, profiler.INTERFERENCE[0]),
        ({"reasons": 0x40}, profiler.INTERFERENCE[1]),
        ({"clock": 1700}, profiler.INTERFERENCE[2]),
    ],
)
def test_what_taints_an_epoch(nvml: Nvml, change: dict[str, Any], cause: str) -> None:
    watch = profiler.Watch(GPU)
    assert watch.end().interference == ()
    for name, value in change.items():
        setattr(nvml, name, value)
    assert watch.end().interference == (cause,)


def test_a_power_cap_or_a_foreign_pid_namespace_taints_nothing(nvml: Nvml) -> None:
    nvml.reasons, nvml.pids = 0x04, [7, 8]
    assert profiler.Watch(GPU).end().interference == ()


def test_swapping_and_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = profiler.Watch(torch.device("cpu"))
    assert watch.end() == profiler.Watched(None, ())
    swapped = (profiler._pages_swapped() or 0) + 1
    monkeypatch.setattr(profiler, "_pages_swapped", lambda: swapped)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    assert watch.end().interference == profiler.INTERFERENCE[3:]


def test_memory_of_this_process_or_the_reason(nvml: Nvml) -> None:
    assert profiler._NvmlProcess(0).read() == Measurement(value=3072.0)
    nvml.pids = [7]
    reading = profiler._NvmlProcess(0).read()
    assert reading.value is None
    assert "PID namespace" in str(reading.reason)


def test_gpus_are_counted_as_cuda_would_show_them(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiler.count_gpus() == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert profiler.count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert profiler.count_gpus() == 0


def test_the_largest_of_the_ranks_and_null_only_where_none_could_read() -> None:
    none = Measurement(value=None, reason="no")

    def memory(rss: float, nvml: Measurement) -> Memory:
        return Memory(
            torch_allocated_mib=none,
            torch_reserved_mib=none,
            nvml_process_mib=nvml,
            rss_mib=Measurement(value=rss),
        )

    peak = profiler.largest(
        [memory(1.0, none), memory(3.0, Measurement(value=5.0)), memory(2.0, Measurement(value=4.0))]
    )
    assert peak == memory(3.0, Measurement(value=5.0))


def test_waiting_counts_what_the_loader_took() -> None:
    def slow() -> Any:
        for item in range(3):
            time.sleep(0.02)
            yield item

    waiting = profiler.Waiting()
    for _ in waiting.over(slow()):
        time.sleep(0.02)
    assert 0.06 <= waiting.seconds < 0.12


def test_categories_add_up_to_what_the_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of invented figures, in MiB: the loader's tensors and DALI's pools, a graph's pool, what nobody claims."""
    mib = 2**20
    now = {"used": 1000.0, "reserved": 0.0, "allocated": 0.0}

    class Nvml:
        peak: float | None = None

        def __init__(self, index: int) -> None:
            pass

        def sample(self) -> None:
            pass

        def read(self) -> Measurement:
            return Measurement(value=now["used"] - 1000)

    def zeros(*size: int, device: Any) -> None:  # makes the context, and the allocator's first block
        now.update(used=1452, reserved=2, allocated=0)

    monkeypatch.setattr(profiler, "_NvmlProcess", Nvml)
    monkeypatch.setattr(profiler, "_nvml_used", lambda _: now["used"])
    monkeypatch.setattr(torch, "zeros", zeros)
    for name in ("memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: now["reserved"] * mib)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: now["allocated"] * mib)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    meter = profiler.MemoryMeter(torch.device("cuda", 0))
    with meter.category("data loader"):  # 20 MiB of tensors, 64 of its own
        now.update(used=1452 + 20 + 64, reserved=22, allocated=20)
    meter.reset()
    network = nn.Linear(1023, 1024)  # 4 MiB
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
    graphs = SimpleNamespace(reserved_bytes=100 * mib)  # with the gradients in it
    now.update(used=2000, reserved=22 + 8 + 6 + 100, allocated=20 + 8 + 2)
    memory = meter.read(network, optimizer, graphs)
    assert memory.by_category_mib == pytest.approx(
        {
            "weights": 4, "gradients": 4, "optimizer state": 4, "activations": 2 + 100 - 4, "allocator slack": 6,
            "data loader": 84, "CUDA context": 450, "unaccounted": 1000 - 136 - 64 - 450,
        }
    )  # fmt: skip
    assert sum(memory.by_category_mib.values()) == pytest.approx(1000)
    assert memory.torch_allocated_mib.value == pytest.approx(130)
    assert (memory.warmup_allocated_mib.value, memory.warmup_reserved_mib.value) == (20, 22)
