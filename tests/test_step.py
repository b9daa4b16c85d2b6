"""The arithmetic of a step: precision switches after each other, and copies that do not wait."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from harness.spec import Precision
from harness.training.step import set_precision, upload

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
READERS: dict[str, Any] = {
    "matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "get_float32_matmul_precision": lambda: torch.get_float32_matmul_precision() == "high",
    "matmul.fp32_precision": lambda: torch.backends.cuda.matmul.fp32_precision == "tf32",
    "conv.fp32_precision": lambda: torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    set_precision("fp32")


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PRECISIONS, repeat=2)))
def test_every_reader_of_the_precision_agrees_whatever_was_set_before(first: Precision, second: Precision) -> None:
    """Mixed, torch's two sets of names make one another raise: for Inductor, that of another one's precision."""
    for precision in (first, second):
        set_precision(precision)
        assert {name: read() for name, read in READERS.items()} == dict.fromkeys(READERS, precision == "tf32")
        with torch.backends.cudnn.flags(benchmark=True):  # reads and restores the switches
            pass


def test_a_copy_to_a_gpu_is_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory it would wait for the stream, whatever `non_blocking` says."""
    calls: list[Any] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        calls.append("pinned")
        return self

    def to(self: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        calls.append((device.type, non_blocking))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    upload(np.zeros(3, np.float32), torch.device("cuda", 0))
    assert calls == ["pinned", ("cuda", True)]
