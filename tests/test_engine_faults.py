"""Engines where something goes wrong: captures that fail or come too late (of several ranks: test_random_failures.py)."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import Tape
from test_engine import Small, batch, make_step
from test_train import run, small

import harness.training.setup
from harness.loaders.resident import ResidentLoader
from harness.training.batch_norm import synchronise_batch_norms
from harness.training.engine import Engine, make_graphs
from harness.training.setup import without_communication


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
    """torch.cuda with its allocators of device and pinned memory, and captures of which the first fails, as one that was
    invalidated does: at its end, or at its `beginning`. After a failure the recording to the pool goes on (torch 2.11 and 2.12;
    `capture_end` in aten/src/ATen/cuda/CUDAGraph.cpp), or torch has ended it (2.14), or `reset` ends it, which raises where it
    has ended already (2.15). Workspaces of cuBLAS are kept by stream, and a graph that is reset frees those of its stream (pull
    request 175276 of PyTorch).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, release: str, *, beginning: bool) -> None:
        self.release, self.beginning = release, beginning
        self.stream: Any = "the caller's"
        self.recording: dict[str, set[Any]] = {"device": set(), "host": set()}  # pools, by allocator
        self.users: Counter[Any] = Counter()  # captures that hold a pool
        self.fails = True
        self.workspaces: dict[Any, SimpleNamespace] = {}  # by stream
        self.capturing: Any = None  # a graph
        pools = itertools.count()
        for name, function in {
            "graph": self.capture,
            "CUDAGraph": lambda: FakeGraph(self),
            "Stream": lambda _: "the capture's",
            "graph_pool_handle": lambda: (0, next(pools)),
            "current_stream": lambda _: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda _: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda _: 0,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda _, pool: self.end(pool, "device"), raising=False
        )
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: self.give_back(pool), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)

    @contextlib.contextmanager
    def capture(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """torch.cuda.graph in short."""
        failed, self.fails = self.fails, False
        self.stream = stream
        for allocator in self.recording.values():  # of each, `begin_allocate_to_pool`
            if pool in allocator:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            allocator.add(pool)
        self.users[pool] += 1
        graph.pool, graph.records, graph.holds = pool, self.release == "2.15", self.release == "2.15"
        fault = RuntimeError("operation failed due to a previous error during capture")
        try:
            if failed and self.beginning:
                raise fault
            self.capturing = graph
            yield
        finally:  # what the function raises does not keep a capture from its end
            self.capturing = None
            if not failed or (self.release != "2.11" and not self.beginning):
                self.stream, graph.records, graph.holds = "the caller's", False, True
                self.end(pool, "device", "host")
        if failed:
            raise fault

    def end(self, pool: Any, *allocators: str) -> None:
        for name in allocators:
            if pool not in self.recording[name]:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.recording[name].remove(pool)

    def give_back(self, pool: Any) -> None:
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "uc >= 0 INTERNAL ASSERT FAILED"

    def clear_workspaces(self, *streams: Any) -> None:
        for stream in streams or [*self.workspaces]:
            if workspace := self.workspaces.pop(stream, None):
                workspace.freed = True

    def multiply(self) -> None:
        """By cuBLAS, in the stream's workspace: memory of the graph's pool where it is taken in a capture."""
        pool = self.capturing and self.capturing.pool
        made = SimpleNamespace(pool=pool, freed=False)
        workspace = self.workspaces.setdefault(self.stream, made)
        if self.capturing:
            self.capturing.workspaces.append(workspace)
        else:
            assert workspace.pool is None, "work outside of the graphs computes in their memory"


class FakeGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.pool: Any = None
        self.records = self.holds = False  # what `reset` knows of the pool
        self.workspaces: list[SimpleNamespace] = []  # whose addresses it replays

    def reset(self) -> None:
        if self.records:
            self.cuda.end(self.pool, "device", "host")
        if self.holds:
            self.cuda.clear_workspaces("the capture's")
            self.cuda.give_back(self.pool)
        self.records = self.holds = False

    def replay(self) -> None:
        for workspace in self.workspaces:
            gone = workspace.freed if workspace.pool is None else not self.cuda.users[workspace.pool]
            assert not gone, "cudaErrorIllegalAddress"


FAULTS = [("2.11", False), ("2.11", True), ("2.14", False), ("2.15", False), ("2.15", True)]


@pytest.mark.parametrize(("release", "beginning"), FAULTS)
def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, release: str, *, beginning: bool
) -> None:
    """Graphs that are captured later are not concerned: those of the next engine, and of evaluation."""
    cuda = FakeCuda(monkeypatch, release, beginning=beginning)
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


@pytest.mark.parametrize("release", ["2.11", "2.14", "2.15"])
def test_a_function_that_raises_in_a_capture_gives_its_pool_back_once(
    monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """The capture has ended as others do, and `reset` is enough."""
    cuda = FakeCuda(monkeypatch, release, beginning=False)
    cuda.fails = False
    graph = make_graphs(torch.device("cuda", 0))()
    with pytest.raises(ValueError, match="no such layer"), graph.capture():
        raise ValueError("no such layer")
    graph.reset()
    assert (cuda.stream, cuda.recording["device"]) == ("the caller's", set())
    assert list(cuda.users.values()) == [0]


@pytest.mark.parametrize(("release", "beginning"), FAULTS)
def test_a_step_outlives_an_evaluation_that_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, release: str, *, beginning: bool
) -> None:
    """They share the stream, by which torch keeps workspaces of cuBLAS, and a replay computes at the addresses of its capture."""
    cuda = FakeCuda(monkeypatch, release, beginning=beginning)
    make_graph = make_graphs(torch.device("cuda", 0))

    def prepare(*, fails: bool) -> Any:
        graph, cuda.fails = make_graph(), fails
        cuda.stream = "the capture's"
        cuda.multiply()  # the warm-up
        cuda.stream = "the caller's"
        with graph.capture():
            cuda.multiply()
        return graph

    step = prepare(fails=False)
    validation = prepare(fails=False)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        prepare(fails=True)
    validation.reset()
    step.replay()


class Watched:
    """A graph that does nothing but count what is compiled in its capture."""

    def __init__(self) -> None:
        self.compiled = self.reserved_bytes = 0

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield
        self.compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs

    def replay(self) -> None: ...

    def reset(self) -> None: ...


@pytest.mark.parametrize("synchronised", [False, True])
def test_nothing_is_compiled_in_a_capture(*, synchronised: bool) -> None:
    """Of several ranks the warm-up has no communication. With batch norms over all ranks it would be another network, which is
    why the plan refuses them for this engine (test_batch_norm.py)."""
    torch.compiler.reset()
    step, network = make_step(), Small()
    if synchronised:
        synchronise_batch_norms(network)
    compiled = torch.compile(network, dynamic=False, fullgraph=True, backend="eager")
    step = replace(step, network=network, forward=compiled, all_reduce=lambda tensor: tensor.mul_(1))
    watched = Watched()
    engine = Engine("compile", step, lambda: watched, without_communication(step))  # type: ignore[arg-type,return-value]
    assert engine.fails([(*batch(16), 16)]) is None
    assert watched.compiled == int(synchronised)
