"""The stub of NVML through the real nvidia-ml-py: it gives what a scenario says and refuses what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml
import pytest

if TYPE_CHECKING:
    from nvml_stub import NvmlStub

pytest_plugins = ["nvml_stub"]


def test_nvidia_ml_py_finds_it_as_it_finds_the_drivers(nvml: NvmlStub) -> None:
    nvml.set(GPUS=3, DRIVER="535.1", CUDA=12020)
    code = """
import json, pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
print(json.dumps([pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion(),
                  [pynvml.nvmlDeviceGetName(h) for h in handles]]))
"""
    assert json.loads(nvml.run(code)) == ["535.1", 12020, ["Stub GPU 0", "Stub GPU 1", "Stub GPU 2"]]


def test_nothing_works_outside_a_session_and_handles_die_with_it(nvml: NvmlStub) -> None:
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()
    pynvml.nvmlInit()
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetMemoryInfo(handle).used == 0, "one of two users is left"
    pynvml.nvmlShutdown()
    for call in (pynvml.nvmlShutdown, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle)):
        with pytest.raises(pynvml.NVMLError_Uninitialized):
            call()
    pynvml.nvmlInit()
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetMemoryInfo(handle)


def test_wrong_arguments_are_refused(nvml: NvmlStub) -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    for call in (
        lambda: pynvml.nvmlDeviceGetHandleByIndex(1),
        lambda: pynvml.nvmlDeviceGetHandleByUUID("00000000-0000-0000-0000-000000000000"),  # no prefix
        lambda: pynvml.nvmlDeviceGetMemoryInfo(None),
        lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.c_nvmlDevice_t()),
        lambda: pynvml.nvmlDeviceGetClockInfo(handle, 9),
    ):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            call()
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetHandleByUUID("GPU-unknown")
    with pytest.raises(pynvml.NVMLError) as wrong:
        pynvml.nvmlDeviceGetMemoryInfo(handle, version=0x01000028)
    assert wrong.value.value == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH
    assert pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).reserved == 512 * 2**20


def test_readings_follow_the_scenario(nvml: NvmlStub) -> None:
    nvml.set(GPUS=2, ENERGY="5000,9000,100", CLOCK="1980,1500", REASONS="0,0x40", USED="10,20")
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in (0, 1)]
    assert [pynvml.nvmlDeviceGetTotalEnergyConsumption(handles[0]) for _ in range(4)] == [5000, 9000, 100, 100]
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(handles[1]) == 5000, "each GPU has a counter of its own"
    assert [pynvml.nvmlDeviceGetClockInfo(handles[0], pynvml.NVML_CLOCK_SM) for _ in range(2)] == [1980, 1500]
    assert [pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handles[0]) for _ in range(2)] == [0, 0x40]
    assert [pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles] == [10 * 2**20, 20 * 2**20]
    nvml.set(USED="11,20")
    assert pynvml.nvmlDeviceGetMemoryInfo(handles[0]).used == 11 * 2**20, "a scenario may change meanwhile"
    assert [pynvml.nvmlDeviceGetPciInfo(handle).bus for handle in handles] == [16, 32]
    found = pynvml.nvmlDeviceGetHandleByPciBusId("00000000:20:00.0")
    assert pynvml.nvmlDeviceGetUUID(found) == "GPU-00000000-0000-0000-0000-000000000001"


def test_processes_of_a_gpu_and_of_a_part_of_it(nvml: NvmlStub) -> None:
    nvml.set(GPUS=2, MIG="2,0", PROCESSES="0/0:self:100,0/1:77:?,1:88:300")
    pynvml.nvmlInit()
    whole = pynvml.nvmlDeviceGetHandleByIndex(0)
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(whole)
    assert [(p.pid, p.usedGpuMemory) for p in listed] == [(os.getpid(), 100 * 2**20), (77, None)]
    part = pynvml.nvmlDeviceGetHandleByUUID("MIG-00000000-0000-0000-0000-000000000001")
    assert [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(part)] == [77]
    assert pynvml.nvmlDeviceGetMigMode(whole) == [1, 1]
    parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)
    assert pynvml.nvmlDeviceGetUUID(parent) == pynvml.nvmlDeviceGetUUID(whole)
    for call in (pynvml.nvmlDeviceGetTotalEnergyConsumption, pynvml.nvmlDeviceGetUtilizationRates):
        with pytest.raises(pynvml.NVMLError_NotSupported):
            call(part)


def test_failures(nvml: NvmlStub, tmp_path: Path) -> None:
    nvml.set(GPUS=2, FAIL="nvmlDeviceGetPowerUsage=3,nvmlDeviceGetClockInfo=15@2", LOST="1", LOG=tmp_path / "log")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetPowerUsage(handle)
    for _ in range(2):
        pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    for call in (lambda: pynvml.nvmlDeviceGetClockInfo(handle, 1), lambda: pynvml.nvmlDeviceGetHandleByIndex(1)):
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            call()
    assert (tmp_path / "log").read_text().split()[:2] == ["nvmlInitWithFlags", "nvmlDeviceGetHandleByIndex_v2"]
    nvml.set(FAIL=f"nvmlInitWithFlags={pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}")
    with pytest.raises(pynvml.NVMLError_LibRmVersionMismatch):
        pynvml.nvmlInit()


def test_an_old_library_lacks_functions(nvml: NvmlStub, tmp_path: Path) -> None:
    nvml.use_old(tmp_path, without=("nvmlDeviceGetComputeRunningProcesses_v3",))
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    with pytest.raises(pynvml.NVMLLibraryMismatchError) as error:
        pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert not isinstance(error.value, pynvml.NVMLError), "so who catches NVMLError alone does not catch this"
