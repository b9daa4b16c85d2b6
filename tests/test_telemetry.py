"""What a node does while a run goes on: stand-ins for NVML, this machine's own processors."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from records import NOW, make_epoch, make_memory, make_record

from harness.cluster.job import Allocation, Telemetry
from harness.cluster.launch import launch_here
from harness.cluster.workers import gather
from harness.results.explain import why
from harness.results.report.page import make_page
from harness.results.rows import summarise
from harness.results.store import Stored
from harness.results.values import EpochMetrics, GpuUse, Measurement, NodeUse, RankUse
from harness.training import host
from harness.training.host import NodeTelemetry
from harness.training.telemetry import EpochTelemetry, summarise_rank

MIB = 2**20


class FakeNvml:
    """Two GPUs whose load is known; one of them does not count energy."""

    def __init__(self) -> None:
        self.asked = 0

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index > 1:
            raise RuntimeError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        return {"GPU-b": 1}[uuid]

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{'ab'[handle]}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        self.asked += 1
        return SimpleNamespace(gpu=50 + 10 * handle)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return 300_000 if self.asked % 2 else 400_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise RuntimeError("Not Supported")
        return 1_000 * self.asked

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=(100 + self.asked) * MIB)


def sample(visible: str | None, nvml: Any, least: int = 4) -> NodeUse:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", nvml)
        node = NodeTelemetry(visible, interval_seconds=0.01)
        until = time.monotonic() + 10
        while node._samples < least and time.monotonic() < until:
            time.sleep(0.01)
        return node.stop()


def test_every_gpu_in_use_is_sampled_and_the_thread_ends() -> None:
    nvml = FakeNvml()
    use = sample("0", nvml)
    (gpu,) = use.gpus
    assert use.samples >= 4
    assert (gpu.gpu, gpu.utilisation_percent.value) == ("0", 50.0)
    assert 300 < (gpu.power_watts.value or 0) < 400 == gpu.power_peak_watts.value
    assert gpu.energy_joules.value == nvml.asked
    assert gpu.memory_peak_mib.value == 100 + nvml.asked
    assert use.gpus_reason is None
    assert 0 <= (use.cpu_percent.value or 0) <= 100 or use.cpu_percent.reason
    assert (use.memory_peak_mib.value or 0) > 0
    assert "telemetry" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("visible", "names"), [(None, ["0", "1"]), ("1,0", ["1", "0"]), ("GPU-b", ["GPU-b"])])
def test_gpus_go_by_the_names_that_the_workers_know(visible: str | None, names: list[str]) -> None:
    assert [gpu.gpu for gpu in sample(visible, FakeNvml(), least=1).gpus] == names


def test_what_cannot_be_read_is_null_with_its_reason() -> None:
    (gpu,) = sample("1", FakeNvml(), least=1).gpus
    assert gpu.energy_joules == Measurement(value=None, reason="NVML: Not Supported")
    assert gpu.utilisation_percent.value == 60.0


@pytest.mark.parametrize(
    ("visible", "nvml", "reason"),
    [
        ("", FakeNvml(), "no GPU was used"),
        ("7", FakeNvml(), "NVML: Invalid Argument"),
        ("GPU-unknown", FakeNvml(), "NVML: 'GPU-unknown'"),
        ("0", None, "NVML: import of pynvml halted; None in sys.modules"),
    ],
)
def test_without_nvml_the_node_is_sampled_all_the_same(visible: str, nvml: Any, reason: str) -> None:
    use = sample(visible, nvml, least=1)
    assert (use.gpus, use.gpus_reason) == ((), reason)
    assert use.samples >= 1


def test_without_linux_there_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path)
    use = sample("", None, least=1)
    assert use.cpu_percent == Measurement(value=None, reason="/proc/stat cannot be read here")
    assert use.memory_peak_mib == Measurement(value=None, reason="/proc/meminfo cannot be read here")


def test_the_local_launcher_samples_in_a_thread_and_survives_a_broken_one(tmp_path: Path) -> None:
    events: list[Any] = []

    def launch(watch: Any) -> list[Any]:
        events.clear()
        runs = launch_here(
            lambda spec, *_: spec * 2, [21],
            Allocation(workers=1, concurrent_runs=1, device="cpu", threads=1, storage=tmp_path),
            progress=lambda _, event: events.append(event), telemetry=watch,
        )  # fmt: skip
        return list(runs)

    def broken(visible: str | None) -> Any:
        raise OSError("no threads left")

    assert launch(NodeTelemetry) == [(21, 42)]
    (seen,) = [event for event in events if isinstance(event, Telemetry)]
    assert seen.node.gpus_reason == "no GPU was used"
    assert launch(broken) == [(21, 42)]
    assert not [event for event in events if isinstance(event, Telemetry)]


def metrics(epoch: int, **changes: Any) -> EpochMetrics:
    return make_epoch(epoch, train_seconds=2.0, **changes)


def test_one_rank_has_no_skew_and_its_own_figures() -> None:
    reading = EpochTelemetry(torch.device("cpu")).stop(2.0)
    assert (reading.skew, reading.slowest_rank) == (None, None)
    epochs = [metrics(1, timed=False), metrics(2)]
    (rank,) = gather(summarise_rank(0, make_memory(rss_mib=7.0), epochs))
    assert (rank.train_seconds, rank.data_stall_seconds, rank.rss_mib, rank.nvml_process_mib) == (
        2.0,
        0.5,
        7.0,
        None,
    )


def test_why_and_the_page_show_nodes_and_ranks(tmp_path: Path) -> None:
    def read(value: float) -> Measurement:
        return Measurement(value=value)

    gpu = GpuUse(
        gpu="0", utilisation_percent=read(87.0), power_watts=read(431.0), power_peak_watts=read(612.0),
        energy_joules=Measurement(value=None, reason="NVML: Not Supported"), memory_peak_mib=read(2048.0),
    )  # fmt: skip
    nodes = (
        NodeUse(host="node<1>", seconds=60.0, samples=61, cpu_percent=read(33.0), memory_peak_mib=read(9000.0), gpus=(gpu,)),
        NodeUse(host="node2", seconds=60.0, samples=61, cpu_percent=read(12.0), memory_peak_mib=read(8000.0),
                gpus_reason="no GPU was used"),
    )  # fmt: skip
    ranks = tuple(
        RankUse(rank=rank, host="node<1>", train_seconds=4.0 + rank, data_stall_seconds=0.1, torch_allocated_mib=None,
                torch_reserved_mib=None, nvml_process_mib=1500.0 + rank, rss_mib=900.0)
        for rank in (0, 1)
    )  # fmt: skip
    record = make_record(0, 8.4, workers=2, result={"nodes": nodes, "ranks": ranks})
    folder = tmp_path / record.name
    folder.mkdir()
    lines = [metrics(1, timed=False, skew=3.0, slowest_rank=0), metrics(2, skew=1.25, slowest_rank=1)]
    (folder / "epochs.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
    rows = summarise([Stored(record, folder)])
    text = why(rows[0])
    assert "at most 1.250 (rank 1 in epoch 2)" in text, "warm-up is left out"
    assert "rank 1, host node<1>, train_seconds 5," in text
    assert (
        "gpu 0, utilisation_percent 87, power_watts 431, power_peak_watts 612, energy_joules null (NVML: Not Supported), "
        "memory_peak_mib 2,048" in text
    )
    assert "host node2, seconds 60, samples 61, cpu_percent 12" in text
    page = make_page(rows, bundle="", made_at=NOW)
    assert "<td>node&lt;1&gt;</td><td>33</td><td>9,000</td><td>0</td><td>87</td><td>431</td><td>612</td>" in page
    assert "<td>1,501</td>" in page
    old = make_page(summarise([Stored(make_record(0, 8.4, workers=2), folder)]), bundle="", made_at=NOW)
    assert "Nodes, sampled" not in old, "nothing of records made before"
