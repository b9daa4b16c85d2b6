"""Measurements against a stand-in for NVML: units, reasons, taints. No GPU is needed, none is used."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import profiler
from results.store import Memory, Reading

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
    ("change", "taint"),
    [
        ({"pids": [os.getpid(), 1]}, profiler.TAINTS[0]),
        ({"reasons": 0x40}, profiler.TAINTS[1]),
        ({"clock": 1700}, profiler.TAINTS[2]),
    ],
)
def test_what_taints_an_epoch(nvml: Nvml, change: dict[str, Any], taint: str) -> None:
    watch = profiler.Watch(GPU)
    assert watch.end().taints == ()
    for name, value in change.items():
        setattr(nvml, name, value)
    assert watch.end().taints == (taint,)


def test_a_power_cap_or_a_foreign_pid_namespace_taints_nothing(nvml: Nvml) -> None:
    nvml.reasons, nvml.pids = 0x04, [7, 8]
    assert profiler.Watch(GPU).end().taints == ()


def test_swapping_and_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = profiler.Watch(torch.device("cpu"))
    assert watch.end() == profiler.Watched(None, ())
    swapped = (profiler._pages_swapped() or 0) + 1
    monkeypatch.setattr(profiler, "_pages_swapped", lambda: swapped)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    assert watch.end().taints == profiler.TAINTS[3:]


def test_memory_of_this_process_or_the_reason(nvml: Nvml) -> None:
    assert profiler._NvmlProcess(0).read() == Reading(value=3072.0)
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
    none = Reading(value=None, reason="no")

    def memory(rss: float, nvml: Reading) -> Memory:
        return Memory(
            torch_allocated_mib=none, torch_reserved_mib=none, nvml_process_mib=nvml, rss_mib=Reading(value=rss)
        )

    peak = profiler.largest([memory(1.0, none), memory(3.0, Reading(value=5.0)), memory(2.0, Reading(value=4.0))])
    assert peak == memory(3.0, Reading(value=5.0))


def test_waiting_counts_what_the_loader_took() -> None:
    def slow() -> Any:
        for item in range(3):
            time.sleep(0.02)
            yield item

    waiting = profiler.Waiting()
    for _ in waiting.over(slow()):
        time.sleep(0.02)
    assert 0.06 <= waiting.seconds < 0.12
