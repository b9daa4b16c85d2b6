"""Engines where something goes wrong: captures that fail or come too late (of several ranks: test_random_failures.py)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import Tape
from test_train import run, small

import harness.training.setup
from harness.loaders.resident import ResidentLoader
from harness.training.engine import make_graphs


def test_all_is_captured_before_the_loaders_begin_and_nothing_is_collected_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Logged(Tape):
        @contextlib.contextmanager
        def capture(self) -> Iterator[None]:
            log.append("capture" if not gc.isenabled() else "capture with gc")
            with super().capture():
                yield

        def replay(self) -> None:
            log.append("replay")
            super().replay()

    def epoch(self: Any, epoch: int, first_step: int = 0) -> Any:
        log.append("epoch")
        return whole_epoch(self, epoch, first_step)

    whole_epoch = ResidentLoader.epoch
    monkeypatch.setattr(ResidentLoader, "epoch", epoch)
    monkeypatch.setattr(harness.training.setup, "make_graphs", lambda _: Logged)
    log_meter(monkeypatch, log)
    run(small(engine="graph", limit_train=50, recipe={"val": 10, "duration": 1}), tmp_path)
    first = log.index("epoch")
    assert log[:first].count("capture") == 4, "40 images: 16 and 8; 10 held out; the test set of 16"
    assert log[first:].count("capture") == 0
    assert "capture with gc" not in log
    assert log[first:].count("replay") == 3 + 1 + 1, "every batch is replayed, the test set's too"
    assert log.index("reset") > max(i for i, what in enumerate(log) if what == "capture")
    assert gc.isenabled()


def log_meter(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    meter = harness.training.setup.MemoryMeter
    for name in ("reset", "read"):
        method = getattr(meter, name)

        def logged(self: Any, *args: Any, name: str = name, method: Any = method) -> Any:
            log.append(name)
            return method(self, *args)

        monkeypatch.setattr(meter, name, logged)


class FakeCuda:
    """torch.cuda with a current stream, and a capture whose end fails, as that of one that was invalidated does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = "the caller's"
        self.in_pool = False
        self.resets = 0

        @contextlib.contextmanager
        def capturing(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            """torch.cuda.graph in short: it restores nothing where the capture cannot be ended."""
            self.stream, self.in_pool = stream, True
            yield
            raise RuntimeError("operation failed due to a previous error during capture")

        def end(device: int, pool: Any) -> None:
            if not self.in_pool:
                raise RuntimeError("not in a pool")
            self.in_pool = False

        def reset() -> None:
            self.resets += 1

        for name, function in {
            "graph": capturing,
            "CUDAGraph": lambda: SimpleNamespace(reset=reset, replay=None),
            "Stream": lambda _: "the capture's",
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda _: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda _: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda _: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)


def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    make_graph = make_graphs(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="previous error during capture"), make_graph().capture():
        assert cuda.stream == "the capture's"
    assert (cuda.stream, cuda.in_pool, cuda.resets) == ("the caller's", False, 1)
