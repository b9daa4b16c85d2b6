"""Memory by category against a GPU of invented figures. No GPU is needed, none is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from harness.results.values import Measurement, Memory
from harness.training.memory import MemoryMeter, largest
from harness.training.nvml import Gpu

MIB = 2**20


def test_the_largest_of_the_ranks_and_null_only_where_none_could_read() -> None:
    none = Measurement(value=None, reason="no")

    def memory(rss: float, nvml: Measurement) -> Memory:
        return Memory(
            torch_allocated_mib=none,
            torch_reserved_mib=none,
            nvml_process_mib=nvml,
            rss_mib=Measurement(value=rss),
        )

    peak = largest([memory(1.0, none), memory(3.0, Measurement(value=5.0)), memory(2.0, Measurement(value=4.0))])
    assert peak == memory(3.0, Measurement(value=5.0))


def test_categories_add_up_to_what_the_process_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In MiB: the loader's tensors and DALI's pools, a graph's pool, what nobody claims."""
    now = {"used_mib": 1000.0, "reserved": 0.0, "allocated": 0.0}

    class FakeGpu(Gpu):
        def read(self, figure: str) -> float | None:
            return now[figure]

        def process_mib(self) -> Measurement:
            return Measurement(value=now["used_mib"] - 1000)

    def zeros(*size: int, device: Any) -> None:  # makes the context, and the allocator's first block
        now.update(used_mib=1452, reserved=2, allocated=0)

    monkeypatch.setattr("harness.training.memory.open_device", lambda _: FakeGpu(None, None, "0"))
    monkeypatch.setattr(torch, "zeros", zeros)
    for name in ("memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: now["reserved"] * MIB)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: now["allocated"] * MIB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    meter = MemoryMeter(torch.device("cuda", 0))
    with meter.category("data loader"):  # 20 MiB of tensors, 64 of its own
        now.update(used_mib=1452 + 20 + 64, reserved=22, allocated=20)
    meter.reset()
    network = nn.Linear(1023, 1024)  # 4 MiB
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
    graphs = SimpleNamespace(reserved_bytes=100 * MIB)  # with the gradients in it
    now.update(used_mib=2000, reserved=22 + 8 + 6 + 100, allocated=20 + 8 + 2)
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
