"""The wrapper around NVML and what it says of an epoch, against a stand-in. No GPU is needed, none is used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.results.values import Measurement
from harness.training import host
from harness.training.nvml import count_gpus, open_device
from harness.training.telemetry import INTERFERENCE, EpochReading, EpochTelemetry

GPU = torch.device("cuda", 0)


class Nvml:
    """One GPU: 250 J spent by each question about energy, this process on it."""

    def __init__(self) -> None:
        self.millijoules, self.reasons, self.clock = 1_000_000, 0, 1980
        self.pids = [os.getpid()]
        self.uuids = {"GPU-1234"}

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.uuids:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if handle.startswith("MIG-"):
            raise RuntimeError("Not Supported")
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
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid="1234"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_joules_are_the_counters_difference(nvml: Nvml) -> None:
    assert EpochTelemetry(GPU).stop(1.0) == EpochReading(250.0)


@pytest.mark.parametrize("millijoules", [-1_000_000, -250_000])
def test_a_counter_that_goes_back_or_stands_still_gives_no_joules(nvml: Nvml, millijoules: int) -> None:
    epochs = EpochTelemetry(GPU)
    nvml.millijoules += millijoules
    assert epochs.stop(1.0).energy_joules is None


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"pids": [os.getpid(), 1]}, INTERFERENCE[0]),
        ({"reasons": 0x40}, INTERFERENCE[1]),
        ({"clock": 1700}, INTERFERENCE[2]),
    ],
)
def test_what_interferes_with_an_epoch(nvml: Nvml, change: dict[str, Any], cause: str) -> None:
    epochs = EpochTelemetry(GPU)
    assert epochs.stop(1.0).interference == ()
    for name, value in change.items():
        setattr(nvml, name, value)
    assert epochs.stop(1.0).interference == (cause,)


def test_a_power_cap_or_a_foreign_pid_namespace_is_no_interference(nvml: Nvml) -> None:
    nvml.reasons, nvml.pids = 0x04, [7, 8]
    assert EpochTelemetry(GPU).stop(1.0).interference == ()


def test_swapping_and_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = EpochTelemetry(torch.device("cpu"))
    assert epochs.stop(1.0) == EpochReading(None)
    (tmp_path / "vmstat").write_text("pswpin 99999999999999\n")
    monkeypatch.setattr(host, "PROC", tmp_path)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    assert epochs.stop(1.0).interference == INTERFERENCE[3:5]


def test_memory_of_this_process_or_the_reason(nvml: Nvml) -> None:
    gpu = open_device(GPU)
    assert gpu.process_mib() == Measurement(value=3072.0)
    nvml.pids = [7]
    unlisted = gpu.process_mib()
    assert unlisted.value is None
    assert "PID namespace" in str(unlisted.reason)


def test_what_nvml_cannot_do_is_none_with_the_reason(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_device(GPU)
    assert gpu.read("power_watts") is None
    assert gpu.reason("power_watts") == "NVML: 'Nvml' object has no attribute 'nvmlDeviceGetPowerUsage'"
    nvml.uuids = set()
    lost = open_device(GPU)
    assert (lost.read("used_mib"), lost.reason("used_mib")) == (None, "NVML: Not Found")
    assert lost.process_mib() == Measurement(value=None, reason="NVML: Not Found")
    none = open_device(torch.device("cpu"))
    assert (none.read("energy_joules"), none.reason("energy_joules")) == (None, "no GPU was used")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_device(GPU).reason("used_mib").startswith("NVML: import of pynvml halted")
    assert count_gpus() == 0


@pytest.mark.parametrize("cuda_gives", ["the instance", "the whole GPU"])
def test_a_mig_instance_is_read_and_not_the_whole_gpu(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, cuda_gives: str
) -> None:
    nvml.uuids = {"MIG-5678"} if cuda_gives == "the instance" else {"MIG-5678", "GPU-1234"}
    uuid = "5678" if cuda_gives == "the instance" else "1234"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid=uuid))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5678")
    gpu = open_device(GPU)
    assert gpu.name == "MIG-5678"
    assert gpu.process_mib().value == 3072.0
    assert (gpu.read("energy_joules"), gpu.reason("energy_joules")) == (None, "NVML: Not Supported")


def test_cuda_and_nvml_number_gpus_alike() -> None:
    """By PCI bus, whatever of the harness is imported first; CUDA's own order is by speed."""
    code = "import os, harness; print(os.environ['CUDA_DEVICE_ORDER'])"
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "PCI_BUS_ID\n"


def test_a_count_that_fails_is_none_and_its_session_ends(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.delattr(Nvml, "nvmlDeviceGetCount")
    monkeypatch.setattr(Nvml, "nvmlShutdown", lambda self: ended.append(self))
    assert count_gpus() == 0
    assert ended == [nvml]


def test_gpus_are_counted_as_cuda_would_show_them(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_gpus() == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == 0
