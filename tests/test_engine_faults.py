"""Engines where something goes wrong: captures that fail or come too late (of several ranks: test_random_failures.py)."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
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
    """torch.cuda with its allocators of device and pinned memory, and captures of which the first fails at its end, as one that
    was invalidated does. `unwinds`: torch itself then stops the recording to the pool; 2.11 and 2.12 do not
    (`capture_end` in aten/src/ATen/cuda/CUDAGraph.cpp).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, unwinds: bool) -> None:
        self.stream: Any = "the caller's"
        self.recording: dict[str, set[Any]] = {"device": set(), "host": set()}  # pools, by allocator
        self.users: Counter[Any] = Counter()  # captures that hold a pool
        self.fails, self.unwinds = True, unwinds
        pools = itertools.count()

        def record(pool: Any) -> None:
            """Of each allocator, `begin_allocate_to_pool`."""
            for allocator in self.recording.values():
                if pool in allocator:
                    raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                allocator.add(pool)

        @contextlib.contextmanager
        def capturing(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            """torch.cuda.graph in short."""
            self.stream = stream
            record(pool)
            self.users[pool] += 1
            yield
            failed, self.fails = self.fails, False
            if not failed or unwinds:
                self.stream = "the caller's"
                for allocator in self.recording.values():
                    allocator.remove(pool)
                graph.held.append(pool)
            if failed:
                raise RuntimeError("operation failed due to a previous error during capture")

        def make_graph() -> Any:
            def reset() -> None:
                while graph.held:
                    release(0, graph.held.pop())

            graph = SimpleNamespace(reset=reset, replay=None, held=[])
            return graph

        def end(device: int, pool: Any) -> None:
            if pool not in self.recording["device"]:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.recording["device"].remove(pool)

        def release(device: int, pool: Any) -> None:
            self.users[pool] -= 1
            assert self.users[pool] >= 0, "uc >= 0 INTERNAL ASSERT FAILED"

        for name, function in {
            "graph": capturing,
            "CUDAGraph": make_graph,
            "Stream": lambda _: "the capture's",
            "graph_pool_handle": lambda: (0, next(pools)),
            "current_stream": lambda _: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda _: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda _: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)


@pytest.mark.parametrize("unwinds", [False, True], ids=["torch 2.11", "torch 2.14"])
def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, *, unwinds: bool
) -> None:
    """Graphs that are captured later are not concerned: those of the next engine, and of evaluation."""
    cuda = FakeCuda(monkeypatch, unwinds=unwinds)
    make_graph = make_graphs(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="previous error during capture"), make_graph().capture():
        assert cuda.stream == "the capture's"
    assert (cuda.stream, cuda.recording["device"]) == ("the caller's", set())
    assert not any(cuda.users.values()), "memory of which nobody gives back what it took stays taken"
    graphs = [make_graph() for _ in range(2)]
    for graph in graphs:
        with graph.capture():
            pass
    assert sorted(cuda.users.values()) == [0, 2] or list(cuda.users.values()) == [2], "they share one pool"
    for graph in graphs:
        graph.reset()
    assert not any(cuda.users.values())
