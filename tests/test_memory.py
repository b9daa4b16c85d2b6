"""Memory by category against a GPU of invented figures. No GPU is needed, none is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from records import NO_GPU, make_memory
from test_train import run, small
from torch import nn

import harness.training.train
from harness.results.values import Measurement, Memory
from harness.training.memory import MemoryMeter, largest
from harness.training.nvml import Gpu

MIB = 2**20


def test_the_largest_of_the_ranks_and_null_only_where_none_could_read() -> None:
    def memory(rss: float, nvml: float | Measurement) -> Memory:
        return make_memory(rss_mib=rss, nvml_process_mib=nvml)

    peak = largest([memory(1.0, NO_GPU), memory(3.0, 5.0), memory(2.0, 4.0)])
    assert peak == memory(3.0, 5.0)


class FakeGpu(Gpu):
    """A GPU of invented figures, in MiB, with another process of 1000 on it; torch.cuda's figures agree with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, listed: bool = True) -> None:
        super().__init__(None, None, "0")
        self.others, self.context, self.outside, self.reserved, self.allocated = 1000.0, 0.0, 0.0, 0.0, 0.0
        self.peak_allocated = self.peak_reserved = 0.0
        self.listed = listed  # by NVML, under this process's own number
        monkeypatch.setattr("harness.training.memory.open_device", lambda _: self)
        monkeypatch.setattr("harness.training.memory._kept_mib", {})
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: self.touch())
        monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _: self.context > 0, raising=False)
        for name, function in {
            "memory_reserved": lambda _: self.reserved * MIB,
            "memory_allocated": lambda _: self.allocated * MIB,
            "max_memory_reserved": lambda _: self.peak_reserved * MIB,
            "max_memory_allocated": lambda _: self.peak_allocated * MIB,
            "reset_peak_memory_stats": lambda _: self.use(peak_allocated=0.0, peak_reserved=0.0),
            "empty_cache": lambda: self.use(reserved=self.allocated),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def touch(self) -> None:
        """The first kernel makes the context, and the allocator's first block."""
        self.use(context=450.0, reserved=max(self.reserved, 2.0))

    def use(self, **figures: float) -> None:
        for name, value in figures.items():
            setattr(self, name, value)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    @property
    def own(self) -> float:
        return self.context + self.outside + self.reserved

    def read(self, figure: str) -> float | None:
        return {"used_mib": self.others + self.own}[figure]

    def process_mib(self) -> Measurement:
        return Measurement(value=self.own) if self.listed else Measurement(value=None, reason="not listed")


def make_network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """4 MiB of weights, and as much momentum."""
    network = nn.Linear(1023, 1024)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
    return network, optimizer


def measure_a_run(gpu: FakeGpu, loaded: float = 150.0) -> Memory:
    """Set-up, a capture with a peak of its own and `loaded` MiB of kernels, training, and what is read of it."""
    meter = MemoryMeter(torch.device("cuda", 0))
    with meter.category("data loader"):  # 20 MiB of tensors, 64 of its own, where no earlier run left them
        gpu.use(outside=max(gpu.outside, 64), reserved=22, allocated=20)
    gpu.use(reserved=22 + 500, allocated=20 + 400, outside=gpu.outside + loaded)  # warm-up and capture
    gpu.use(reserved=22 + 8 + 6 + 100, allocated=20 + 8)
    meter.reset()
    gpu.use(outside=gpu.outside + 350, allocated=20 + 8 + 2)
    memory = meter.read(*make_network(), 100 * MIB)  # of graphs, with the gradients in it
    gpu.use(allocated=0.0)  # the loader is closed; its pool and the rest outlive the run
    return memory


EXPECTED = {
    "weights": 4, "gradients": 4, "optimizer state": 4, "activations": 2 + 100 - 4, "allocator slack": 6,
    "data loader": 84, "CUDA context": 450, "kernels": 150, "unaccounted": 350,
}  # fmt: skip


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("before", ["nothing", "a context"])
def test_categories_add_up_to_what_the_process_uses(
    monkeypatch: pytest.MonkeyPatch, before: str, listed: bool
) -> None:
    """The loader's tensors and DALI's pools, a graph's pool, what nobody claims; and a context that Ray made."""
    gpu = FakeGpu(monkeypatch, listed=listed)
    if before == "a context":
        gpu.use(context=450.0)
    memory = measure_a_run(gpu)
    assert memory.torch_allocated_mib.value == pytest.approx(130), "no peak of the capture"
    assert (memory.warmup_allocated_mib.value, memory.warmup_reserved_mib.value) == (420, 522)
    assert memory.nvml_process_mib.value == (450 + 564 + 136 if listed else None)
    if before == "a context" and not listed:
        assert memory.by_category_mib == {}, "what belongs to whom cannot be known"
    else:
        assert memory.by_category_mib == pytest.approx(EXPECTED)
        assert sum(memory.by_category_mib.values()) == pytest.approx(1150)


@pytest.mark.parametrize("listed", [True, False])
def test_a_second_run_in_a_process_has_the_figures_of_the_first(
    monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """900 MiB that the first left in the allocator's cache are given back. What it left outside of it, kernels and 350 MiB
    more, were there when the second began; its loader finds the first one's pool."""
    gpu = FakeGpu(monkeypatch, listed=listed)
    first = measure_a_run(gpu)
    gpu.use(reserved=900.0)
    second = measure_a_run(gpu, loaded=0)
    # where NVML does not list the process, what was left looks like another's
    left = {"data loader": 84, "kernels": 150 + 350} if listed else {"data loader": 20}
    expected = {name: mib for name, mib in EXPECTED.items() if name != "kernels"} | left
    assert second.by_category_mib == pytest.approx(expected)
    for figure in ("torch_allocated_mib", "torch_reserved_mib", "warmup_allocated_mib", "warmup_reserved_mib"):
        assert getattr(second, figure) == getattr(first, figure), figure


def test_where_ranks_first_meet_is_where_nccl_takes_its_buffers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outside of its category they would count as kernels."""
    inside, met = list[str](), list[list[str]]()
    category = MemoryMeter.category

    @contextmanager
    def entered(self: MemoryMeter, name: str) -> Iterator[None]:
        inside.append(name)
        with category(self, name):
            yield
        inside.pop()

    def gather(value: Any) -> list[Any]:
        met.append([*inside])
        return [value]

    monkeypatch.setattr(MemoryMeter, "category", entered)
    for module in ("setup", "train", "checkpoint", "watchdog", "engine", "telemetry"):
        monkeypatch.setattr(f"harness.training.{module}.gather", gather)
    run(small(recipe={"duration": 1}), tmp_path)
    assert met[0] == ["NCCL"]


def test_copies_by_which_weights_are_saved_are_no_part_of_the_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A GPU makes one of each tensor whose strides change, and safetensors one of all of them on the host."""
    log = list[str]()
    read, saved = MemoryMeter.read, harness.training.train.save_weights
    monkeypatch.setattr(MemoryMeter, "read", lambda *given: log.append("read") or read(*given))
    monkeypatch.setattr(harness.training.train, "save_weights", lambda *given: log.append("save") or saved(*given))
    run(small(recipe={"duration": 1}), tmp_path)
    assert log == ["read", "save"]


def test_growth_is_the_largest_of_the_ranks_too() -> None:
    none = Measurement(value=None, reason="no")
    figures = dict.fromkeys(("torch_allocated_mib", "torch_reserved_mib", "nvml_process_mib", "rss_mib"), none)
    ranks = [Memory(**figures, growth_mib_per_epoch=Measurement(value=value)) for value in (0.5, 2.0)]
    assert largest(ranks).growth_mib_per_epoch.value == 2.0
