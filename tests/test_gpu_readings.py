"""What the project reads of GPUs, through the real nvidia-ml-py, from a stub of the driver's library in C."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pynvml
import pytest
import torch

import harness.training.memory
from harness.cluster.job import Allocation
from harness.options import Resources
from harness.resources import Session
from harness.results.values import Measurement
from harness.selfcheck import find_devices
from harness.spec import RunPaths
from harness.training.host import NodeTelemetry
from harness.training.memory import MemoryMeter
from harness.training.nvml import count_gpus, driver_version, open_device, open_visible
from harness.training.telemetry import INTERFERENCE, EpochTelemetry, describe_machine

if TYPE_CHECKING:
    from nvml_stub import NvmlStub

pytest_plugins = ["nvml_stub"]

MIB = 2**20
GPU = torch.device("cuda", 0)
SECOND = torch.device("cuda", 1)


class Cuda:
    """torch's side: the UUIDs of CUDA's devices in CUDA's order, and MiB of its allocator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uuids = ["00000000-0000-0000-0000-000000000000"]
        self.reserved = self.allocated = 0
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=self.uuids[index])
        )
        for name in ("memory_reserved", "max_memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self.reserved * MIB)
        for name in ("memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: self.allocated * MIB)
        for name in ("reset_peak_memory_stats", "empty_cache", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def read_node(visible: str | None) -> Any:
    node = NodeTelemetry(visible, interval_seconds=0.01)
    time.sleep(0.05)
    return node.stop()


# --- which GPU ---


def test_the_gpu_is_the_one_that_cuda_computes_on(nvml: NvmlStub, cuda: Cuda) -> None:
    """CUDA may number GPUs by speed, NVML numbers them by PCI bus: what holds is the UUID."""
    nvml.set(GPUS=2, UUIDS="GPU-aaaa,GPU-bbbb", USED="100,200")
    cuda.uuids = ["bbbb", "aaaa"]
    assert [open_device(device).read("used_mib") for device in (GPU, SECOND)] == [200, 100]


def test_gpus_are_counted_and_the_session_is_closed(
    nvml: NvmlStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.set(GPUS=4, LOG=tmp_path / "log")
    assert count_gpus() == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == 0
    called = (tmp_path / "log").read_text().split()
    assert called.count("nvmlInitWithFlags") == called.count("nvmlShutdown") == 2


def test_gpus_by_any_name_that_cuda_takes(nvml: NvmlStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UUID may be cut short; of MIG instances one GPU has several. A GPU that is lost is no traceback before a run."""
    nvml.set(GPUS=2, UUIDS="GPU-8932f937-d72c,GPU-77aa", USED="100,200", MIG=2)
    assert [gpu.read("used_mib") for gpu in open_visible("GPU-77,GPU-8932f937")] == [200, 100]
    with pytest.raises(Exception, match="Not Found"):
        open_visible("GPU-99")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0,MIG-1,MIG-2")
    assert count_gpus() == 3
    allocation = Allocation(device="cuda", workers=2, gpus=2, concurrent_runs=1, threads=1)
    session = Session(allocation, Resources(), RunPaths(out=Path()), ExitStack())
    for visible, lost in (("0,7", ""), ("GPU-99", ""), ("0,1", "1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        nvml.set(GPUS=2, LOST=lost)
        assert [device.name for device in find_devices(session)] == ["cuda:0", "cuda:1"], visible


def test_counting_does_not_end_the_session_of_a_reader(nvml: NvmlStub, cuda: Cuda) -> None:
    gpu = open_device(GPU)
    assert count_gpus() == 1
    assert gpu.read("power_watts") == 431.0


@pytest.mark.parametrize("cuda_gives", ["the instance", "the whole GPU"])
def test_a_mig_instance_is_read_by_itself(
    nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, cuda_gives: str
) -> None:
    instance = "MIG-00000000-0000-0000-0000-000000000001"
    nvml.set(MIG="2", PROCESSES="0/0:7:999,0/1:self:100,0/1:self:100")  # listed twice, it counts once
    cuda.uuids = [instance.removeprefix("MIG-") if cuda_gives == "the instance" else cuda.uuids[0]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", instance)
    gpu = open_device(GPU)
    assert gpu.read("processes") == {os.getpid(): 100}, "the neighbour's process is in another instance"
    assert (gpu.read("energy_joules"), gpu.reason("energy_joules")) == (None, "NVML: Not Supported")
    (use,) = read_node(instance).gpus
    assert use.gpu == instance
    assert use.utilisation_percent == Measurement(value=None, reason="NVML: Not Supported")
    assert EpochTelemetry(GPU).stop(1.0).energy_joules is None


# --- what it says ---


@pytest.mark.parametrize(
    ("processes", "value", "reason"),
    [
        ("0:self:3072,0:77:100", 3072.0, None),
        ("0:self:3072,0:self:3072", 3072.0, None),  # listed twice, it is counted once
        ("0:77:100", None, "PID namespace"),
        ("", None, "PID namespace"),
        ("0:self:?", None, "does not give the memory of processes"),
    ],
)
def test_memory_of_this_process_or_the_reason(
    nvml: NvmlStub, cuda: Cuda, processes: str, value: float | None, reason: str | None
) -> None:
    nvml.set(PROCESSES=processes)
    reading = open_device(GPU).process_mib()
    assert reading.value == value
    assert reason is None or reason in str(reading.reason)


def test_joules_of_an_epoch_and_of_a_node(nvml: NvmlStub, cuda: Cuda) -> None:
    nvml.set(ENERGY="1000000,1250000,2000000,5000000")  # the epoch's start and end, the node's start and end
    assert EpochTelemetry(GPU).stop(1.0).energy_joules == 250
    (use,) = read_node(None).gpus
    assert use.energy_joules.value == 3000


@pytest.mark.parametrize("counter", ["5000000,100", "5000000"], ids=["goes back", "stands still"])
def test_a_counter_that_does_not_count_gives_no_energy(nvml: NvmlStub, cuda: Cuda, counter: str) -> None:
    """A driver that is reloaded starts at zero; some boards never count. A GPU spends energy at every moment."""
    nvml.set(ENERGY=counter)
    assert EpochTelemetry(GPU).stop(60.0).energy_joules is None
    (use,) = read_node(None).gpus
    assert use.energy_joules.value is None
    assert use.energy_joules.reason


@pytest.mark.parametrize(
    ("later", "cause"),
    [
        ({"PROCESSES": "0:self:100,0:77:100"}, INTERFERENCE[0]),
        ({"REASONS": "0x08"}, INTERFERENCE[1]),
        ({"REASONS": "0x40"}, INTERFERENCE[1]),
        ({"CLOCK": "1500"}, INTERFERENCE[2]),
        ({"REASONS": "0x04"}, None),  # a power cap
        ({"PROCESSES": "0:77:100,0:78:100"}, None),  # a foreign PID namespace
        ({"PROCESSES": "0:self:100,0:self:100"}, None),
    ],
)
def test_what_interferes_with_an_epoch(
    nvml: NvmlStub, cuda: Cuda, later: dict[str, str], cause: str | None
) -> None:
    nvml.set(PROCESSES="0:self:100")
    epochs = EpochTelemetry(GPU)
    assert epochs.stop(1.0).interference == ()
    nvml.set(**later)
    assert epochs.stop(1.0).interference == (() if cause is None else (cause,))


def test_a_clock_that_cannot_be_read_has_not_fallen(nvml: NvmlStub, cuda: Cuda) -> None:
    nvml.set(FAIL=f"nvmlDeviceGetClockInfo={pynvml.NVML_ERROR_UNKNOWN}@1")
    epochs = EpochTelemetry(GPU)
    assert [epochs.stop(1.0).interference for _ in range(2)] == [(), ()]


# --- what goes wrong ---


def test_what_is_not_supported_is_none_with_a_reason(nvml: NvmlStub, cuda: Cuda) -> None:
    nvml.set(FAIL="nvmlDeviceGetTotalEnergyConsumption=3,nvmlDeviceGetComputeRunningProcesses_v3=3")
    gpu = open_device(GPU)
    assert (gpu.read("energy_joules"), gpu.reason("energy_joules")) == (None, "NVML: Not Supported")
    assert gpu.process_mib() == Measurement(value=None, reason="NVML: Not Supported")
    reading = EpochTelemetry(GPU).stop(1.0)
    assert (reading.energy_joules, reading.interference) == (None, ())


def test_a_gpu_that_is_lost_in_the_middle(nvml: NvmlStub, cuda: Cuda) -> None:
    nvml.set(PROCESSES="0:self:100")
    epochs, gpu = EpochTelemetry(GPU), open_device(GPU)
    assert gpu.read("used_mib") == 0
    nvml.set(LOST="0")
    assert (gpu.read("used_mib"), gpu.reason("used_mib")) == (None, "NVML: GPU is lost")
    assert epochs.stop(1.0).energy_joules is None
    assert open_device(GPU).process_mib() == Measurement(value=None, reason="NVML: GPU is lost")
    assert read_node(None).gpus_reason == "NVML: GPU is lost"


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_driver_that_does_not_start(nvml: NvmlStub, cuda: Cuda, code: int) -> None:
    """The first is what an update of the driver leaves until the machine is started again."""
    nvml.set(FAIL=f"nvmlInitWithFlags={code}")
    reason = f"NVML: {pynvml.NVMLError(code)}"
    assert count_gpus() == 0
    assert open_device(GPU).process_mib() == Measurement(value=None, reason=reason)
    assert read_node(None).gpus_reason == reason
    assert EpochTelemetry(GPU).stop(1.0).energy_joules is None


def test_an_old_library_lacks_functions(nvml: NvmlStub, cuda: Cuda, tmp_path: Path) -> None:
    nvml.use_old(tmp_path, ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetTotalEnergyConsumption"))
    gpu = open_device(GPU)
    assert gpu.read("used_mib") == 0
    assert gpu.process_mib().value is None
    assert "NVML" in str(gpu.process_mib().reason)
    assert (gpu.read("energy_joules"), gpu.reason("energy_joules")) == (None, "NVML: Function Not Found")
    assert EpochTelemetry(GPU).stop(1.0).interference == ()


def test_the_driver_is_recorded(nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.set(DRIVER="535.183.01", CUDA=12020)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Stub GPU 0")
    assert driver_version() == "535.183.01"
    assert describe_machine(GPU)["driver"] == "535.183.01"
    nvml.set(FAIL="nvmlSystemGetDriverVersion=18")
    assert describe_machine(GPU)["driver"].startswith("unknown: RM has detected")


def test_a_fresh_process_reads_the_library_that_the_loader_finds(nvml: NvmlStub) -> None:
    nvml.set(GPUS=2, USED="10,20", PROCESSES="0:self:8")
    code = """
import json, sys
from types import ModuleType, SimpleNamespace
from harness.training.nvml import count_gpus, open_visible
gpus = open_visible(None)
print(json.dumps([count_gpus(), [gpu.read("used_mib") for gpu in gpus], gpus[0].process_mib().value,
                  "torch" in sys.modules]))
"""
    assert json.loads(nvml.run(code)) == [2, [10, 20], 8, False]


# --- whose memory it is ---

OTHERS, CONTEXT, CACHED = 1000, 450, 900  # MiB


def read_context(
    nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch, *, before: int, neighbour: int = 0
) -> float:
    """MiB that a run's report calls CUDA context, where this process held `before` MiB when the run began. A neighbour may
    take some at the same moment."""

    def show(own: int) -> None:
        mine = f",0:self:{own}" if own else ""
        others = OTHERS + neighbour * (own > before)
        nvml.set(USED=others + own, PROCESSES=f"0:77:{others}{mine}")

    def zeros(*size: int, **_: Any) -> None:  # the first tensor makes the context
        cuda.reserved = max(cuda.reserved, 2)
        show(CONTEXT + cuda.reserved)

    def empty_cache() -> None:
        if before:
            cuda.reserved = 0
            show(CONTEXT)

    show(before)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _: before > 0)
    monkeypatch.setattr(harness.training.memory, "_kept_mib", {})
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _: before > 0, raising=False)
    monkeypatch.setattr("harness.training.memory._kept_mib", {})  # as in a process of its own
    meter = None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        meter = MemoryMeter(GPU)
    network = torch.nn.Linear(2, 2)
    memory = meter.read(network, SimpleNamespace(state={}))  # type: ignore[arg-type]
    assert sum(memory.by_category_mib.values()) == pytest.approx(memory.nvml_process_mib.value)
    return memory.by_category_mib.get("CUDA context", 0.0)


def test_the_context_of_a_first_run(nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_context(nvml, cuda, monkeypatch, before=0) == CONTEXT


def test_a_neighbour_that_starts_meanwhile_is_no_part_of_the_context(
    nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_context(nvml, cuda, monkeypatch, before=0, neighbour=450) == CONTEXT


def test_the_context_that_was_there_before_the_run(
    nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray sets the device before the worker's code runs, which makes the context."""
    assert read_context(nvml, cuda, monkeypatch, before=CONTEXT) == CONTEXT


def test_the_context_of_a_second_run(nvml: NvmlStub, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run's blocks are still in torch's cache."""
    cuda.reserved = CACHED
    assert read_context(nvml, cuda, monkeypatch, before=CONTEXT + CACHED) == CONTEXT
