"""How a training step is carried out: kernel by kernel, by compiled kernels, or captured once and replayed.

    eager     PyTorch's kernels, launched one by one
    compile   forward and backward compiled (chains of convolution, batch norm and relu become few kernels); on a GPU
              the step is captured too
    graph     eager's kernels, the whole step captured once as a CUDA graph and replayed by one launch

A CUDA graph replays the same kernels on the same addresses: a number that Python holds is frozen in it. So what
changes between steps (images, labels, lr) lives in tensors that stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

WARMUP_CALLS = 3  # before a capture: cuDNN chooses its kernels, compilers compile, NCCL connects
Function = Callable[..., Any]
Snapshot = Callable[[], Callable[[], None]]


class Graph(Protocol):
    """Something that records work on a device and does it again."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Do the work WARMUP_CALLS times, not recorded."""

    def capture(self) -> AbstractContextManager[None]:
        """Record what is done inside."""

    def replay(self) -> None:
        """Do it again, on the same tensors."""


class CudaGraphs:
    """Makes the graphs of one run, which share a memory pool and a stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.reserved_bytes = 0  # by the pool
        self.captures = 0

    def __call__(self) -> Graph:
        return _CudaGraph(self)


class _CudaGraph:
    def __init__(self, shared: CudaGraphs) -> None:
        self._shared = shared
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], Any]) -> None:
        stream, caller = self._shared.stream, torch.cuda.current_stream(self._shared.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                work()
        caller.wait_stream(stream)

    @contextmanager
    def capture(self) -> Iterator[None]:
        shared = self._shared
        torch.cuda.synchronize(shared.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(shared.device)
        # thread_local: DALI's and NCCL's threads may call CUDA meanwhile
        with torch.cuda.graph(
            self._graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"
        ):
            yield
        shared.reserved_bytes += torch.cuda.memory_reserved(shared.device) - before
        shared.captures += 1

    def replay(self) -> None:
        self._graph.replay()


class Captured:
    """A function replayed from graphs, one for each set of shapes and constants it is called with.

    It must do the same work at every call: read its inputs and tensors that stay where they are, write tensors that
    stay where they are. Warm-up and capture leave no trace in what `snapshot` covers. What it returns is valid until
    the next call.
    """

    def __init__(self, function: Function, snapshot: Snapshot, make_graph: Callable[[], Graph]) -> None:
        self._function = function
        self._snapshot = snapshot
        self._make_graph = make_graph
        self._graphs: dict[tuple[Any, ...], tuple[Graph, tuple[Any, ...], Any]] = {}

    def __call__(self, *inputs: Tensor | float) -> Any:
        """Tensors are copied into the graph's own; a number is a constant of it."""
        key = signature(inputs)
        if key not in self._graphs:
            self._graphs[key] = self._record(inputs)
        graph, own, result = self._graphs[key]
        for static, new in zip(own, inputs, strict=True):
            if isinstance(new, Tensor):
                static.copy_(new, non_blocking=True)
        graph.replay()
        return result

    def _record(self, inputs: Sequence[Tensor | float]) -> tuple[Graph, tuple[Any, ...], Any]:
        own = tuple(torch.empty_like(i).copy_(i) if isinstance(i, Tensor) else i for i in inputs)
        graph, restore = self._make_graph(), self._snapshot()
        try:
            graph.warm_up(lambda: self._function(*own))
            with graph.capture():
                result = self._function(*own)
        finally:
            restore()
        return graph, own, result


def signature(inputs: Sequence[Tensor | float]) -> tuple[Any, ...]:
    """What a graph is made for: shapes, strides and types of tensors, and numbers."""
    return tuple((i.shape, i.stride(), i.dtype) if isinstance(i, Tensor) else i for i in inputs)


class Engine:
    """The fastest of some ways to do the same that works here. Giving one up is a warning, and is recorded."""

    def __init__(
        self, ways: Sequence[tuple[str, Function]], snapshot: Snapshot, warn: Callable[[str], None]
    ) -> None:
        self._ways = list(ways)
        self._snapshot = snapshot
        self._warn = warn
        self._proven: set[tuple[Any, ...]] = set()

    @property
    def name(self) -> str:
        """Of the way that is taken."""
        return self._ways[0][0]

    def __call__(self, *inputs: Tensor | float) -> Any:
        """Raises what the last way raises, and any way's lack of memory."""
        key = signature(inputs)
        while len(self._ways) > 1 and key not in self._proven:
            restore = self._snapshot()
            name, way = self._ways[0]
            try:
                result = way(*inputs)
            except (torch.OutOfMemoryError, dist.DistError):
                raise
            except Exception as error:
                restore()
                self._ways.pop(0)
                self._proven.clear()
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._warn(f"engine {name} does not work here, going on with {self.name}: {first}")
            else:
                self._proven.add(key)
                return result
        return self._ways[0][1](*inputs)


def nothing_to_restore() -> Callable[[], None]:
    """The snapshot of a function that changes nothing."""
    return lambda: None


def make_graphs(device: torch.device) -> Callable[[], Graph]:
    """What captures on this device. Raises RuntimeError where nothing does."""
    if device.type != "cuda":
        raise RuntimeError(f"a {device.type} cannot capture graphs, a GPU can")
    return CudaGraphs(device)


def compile_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiled for each batch size on its own. Raises, when called, where a part of it cannot be compiled."""
    import torch._dynamo

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    torch._dynamo.config.recompile_limit = 64  # networks of many runs share their code, and the limit counts that
    return torch.compile(network, dynamic=False, fullgraph=True)
