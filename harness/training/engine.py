"""How a training step is carried out: kernel by kernel, by compiled kernels, or captured once and replayed.

    eager     PyTorch's kernels, launched one by one
    compile   forward and backward compiled (chains of convolution, batch norm and relu become few kernels); on a GPU
              the step is captured too
    graph     eager's kernels, the whole step captured once as a CUDA graph and replayed by one launch

A CUDA graph replays the same kernels on the same addresses: a number that Python holds is frozen in it. So what
changes between steps (images, labels, lr) lives in tensors that stay where they are. Everything is captured before
the first step and before the loaders begin, since their threads may make a capture fail.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch._dynamo  # here and not at first use: torch.fx would keep the frame of that use, and all it refers to
import torch.distributed as dist
from torch import Tensor, nn

from harness.training.telemetry import gather

WARMUP_CALLS = 3  # before a capture: cuDNN chooses its kernels, compilers compile
Function = Callable[..., Any]
Inputs = tuple[Tensor | float, ...]
Snapshot = Callable[[], Callable[[], None]]


class CudaGraphs:
    """Makes the graphs of one run, which share a memory pool and a stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.reserved_bytes = 0  # by the pool

    def __call__(self) -> CudaGraph:
        return CudaGraph(self)


class CudaGraph:
    """Records work on a device and does it again, on the same tensors."""

    def __init__(self, shared: CudaGraphs) -> None:
        self._shared = shared
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Do the work WARMUP_CALLS times, not recorded."""
        stream, caller = self._shared.stream, torch.cuda.current_stream(self._shared.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                work()
        caller.wait_stream(stream)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what is done inside."""
        shared, caller = self._shared, torch.cuda.current_stream(self._shared.device)
        torch.cuda.synchronize(shared.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(shared.device)
        try:
            # thread_local: NCCL's threads may call CUDA meanwhile
            with torch.cuda.graph(
                self._graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"
            ):
                yield
        except BaseException:
            # a capture that cannot be ended leaves the allocator in the graphs' pool; before torch 2.14, its stream too
            torch.cuda.set_stream(caller)
            with suppress(RuntimeError):  # it has ended already
                torch._C._cuda_endAllocateToPool(shared.device.index or 0, shared.pool)
            self._graph.reset()
            raise
        shared.reserved_bytes += torch.cuda.memory_reserved(shared.device) - before

    def replay(self) -> None:
        """Do it again."""
        self._graph.replay()

    def reset(self) -> None:
        """Give back what it holds, whoever still refers to it."""
        self._graph.reset()


class Direct:
    """A function called as it is. `trial`, if given, is what `prepare` calls in its place."""

    def __init__(self, function: Function, trial: Function | None = None) -> None:
        self._function, self._trial = function, trial or function

    def prepare(self, *inputs: Tensor | float) -> None:
        """Call it once, so that it fails now if it fails."""
        self._trial(*inputs)

    def __call__(self, *inputs: Tensor | float) -> Any:
        return self._function(*inputs)

    def reset(self) -> None:
        """It holds nothing."""


class Captured:
    """A function replayed from graphs, one for each set of shapes and constants that it was prepared for.

    It must do the same work at every call: read its inputs and tensors that stay where they are, write tensors that
    stay where they are. `warm_up`, called before a capture, is the same without communication, so that a rank
    whose capture fails leaves no other waiting for it. What a call returns is valid until the next one. With other
    shapes than it was prepared for, the function itself is called.
    """

    def __init__(
        self, function: Function, make_graph: Callable[[], CudaGraph], warm_up: Function | None = None
    ) -> None:
        self._function = function
        self._warm_up = warm_up or function
        self._make_graph = make_graph
        self._graphs: dict[tuple[Any, ...], tuple[CudaGraph, Inputs, Any]] = {}

    def prepare(self, *inputs: Tensor | float) -> None:
        """Capture a graph for such inputs: tensors are copied into its own, a number is a constant of it."""
        key = signature(inputs)
        if key in self._graphs:
            return
        own: Inputs = tuple(torch.empty_like(i).copy_(i) if isinstance(i, Tensor) else i for i in inputs)
        graph = self._make_graph()
        graph.warm_up(lambda: self._warm_up(*own))
        with graph.capture():
            result = self._function(*own)
        self._graphs[key] = graph, own, result
        if _alone():  # with other ranks, they would have to replay too
            graph.replay()

    def __call__(self, *inputs: Tensor | float) -> Any:
        key = signature(inputs)
        if key not in self._graphs:
            return self._function(*inputs)
        graph, own, result = self._graphs[key]
        for static, new in zip(own, inputs, strict=True):
            if isinstance(static, Tensor) and isinstance(new, Tensor):
                static.copy_(new, non_blocking=True)
        graph.replay()
        return result

    def reset(self) -> None:
        """Give the graphs back: a process group cannot be destroyed while one that uses it exists."""
        for graph, _, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def signature(inputs: Sequence[Tensor | float]) -> tuple[Any, ...]:
    """What a graph is made for: shapes, strides and types of tensors, and numbers."""
    return tuple((i.shape, i.stride(), i.dtype) if isinstance(i, Tensor) else i for i in inputs)


class Engine:
    """The first of some ways to do the same that works on every rank. Giving one up is a warning, and is recorded."""

    def __init__(
        self, ways: Sequence[tuple[str, Direct | Captured]], snapshot: Snapshot, warn: Callable[[str], None]
    ) -> None:
        self._ways = list(ways)
        self._snapshot = snapshot
        self._warn = warn

    @property
    def name(self) -> str:
        """Of the way that is taken."""
        return self._ways[0][0]

    def prepare(self, calls: Sequence[Inputs]) -> None:
        """Try the ways on calls like those to come and stay with the first that works. No trace of it is left.

        A collective: the ranks take the same way. Raises a lack of memory.
        """
        while len(self._ways) > 1:
            name, way = self._ways[0]
            reasons = gather(self._try(way, calls))
            failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
            if not failed:
                return
            way.reset()
            self._ways.pop(0)
            rank, reason = failed[0]
            where = "here" if len(reasons) == 1 else f"on rank {rank}"
            self._warn(f"engine {name} does not work {where}, going on with {self.name}: {reason}")

    def _try(self, way: Direct | Captured, calls: Sequence[Inputs]) -> str | None:
        """Why it does not work, None if it does."""
        restore = self._snapshot()
        gc.collect()
        gc.disable()  # what it frees could break a capture
        try:
            for inputs in calls:
                way.prepare(*inputs)
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            gc.enable()
            restore()
        return None

    def __call__(self, *inputs: Tensor | float) -> Any:
        return self._ways[0][1](*inputs)

    def reset(self) -> None:
        """Give back all graphs."""
        for _, way in self._ways:
            way.reset()


def nothing_to_restore() -> Callable[[], None]:
    """The snapshot of a function that changes nothing."""
    return lambda: None


def make_graphs(device: torch.device) -> Callable[[], CudaGraph]:
    """What captures on this device. Raises RuntimeError where nothing does."""
    if device.type != "cuda":
        raise RuntimeError(f"a {device.type} cannot capture graphs, a GPU can")
    return CudaGraphs(device)


def compile_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiled for each batch size on its own. Raises, when called, where a part of it cannot be compiled."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    torch._dynamo.config.recompile_limit = 64  # networks of many runs share their code, and the limit counts that
    return torch.compile(network, dynamic=False, fullgraph=True)
