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
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch._dynamo  # here and not at first use: torch.fx would keep the frame of that use, and all it refers to
import torch.distributed as dist
from torch import Tensor, nn

from harness.cluster.workers import count_ranks, gather

WARMUP_CALLS = 3  # before a capture: cuDNN chooses its kernels, compilers compile
Function = Callable[..., Any]
Inputs = tuple[Tensor | float, ...]
MakeGraph = Callable[[], "CudaGraph"]


class CudaGraph:
    """Records work on a device and does it again, on the same tensors. The graphs of a run share the last of `pools`, and the
    stream."""

    def __init__(self, device: torch.device, pools: list[Any], stream: torch.cuda.Stream) -> None:
        self._device, self._pools, self._stream = device, pools, stream
        self._graph = torch.cuda.CUDAGraph()
        self.reserved_bytes = 0  # by which the pool grew
        self.replay = self._graph.replay
        self.reset = self._graph.reset  # gives back what it holds, whoever still refers to it

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Do the work WARMUP_CALLS times, not recorded."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUP_CALLS):
                work()
        caller.wait_stream(self._stream)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record what is done inside."""
        caller = torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        # else it would use cuBLAS's workspace of the stream, which torch 2.12 frees with the first graph that is reset
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before, index, pool = torch.cuda.memory_reserved(self._device), self._device.index or 0, self._pools[-1]
        try:
            # thread_local: NCCL's threads may call CUDA meanwhile
            with torch.cuda.graph(self._graph, pool, self._stream, "thread_local"):
                yield
        except BaseException:
            # before torch 2.14, a capture that cannot be ended leaves its stream, and the allocators of the device and of
            # pinned memory record into the pool: the second cannot be ended from here, and refuses that pool from now on
            torch.cuda.set_stream(caller)
            self._pools.append(torch.cuda.graph_pool_handle())
            self._graph.reset()  # first: in torch 2.15 it ends the recording itself, and raises where it has ended
            with suppress(RuntimeError):  # it has ended already
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()  # else work outside of the graphs would use theirs
        self.reserved_bytes = torch.cuda.memory_reserved(self._device) - before


@dataclass(slots=True)
class Engine:
    """A function and how its calls are carried out: as they are or, with `make_graph`, replayed from graphs of the calls
    that it was prepared for.

    A captured function must do the same work at every call: read its inputs and tensors that stay where they are, write
    tensors that stay where they are. What a call returns is valid until the next one. With other shapes or constants
    than it was prepared for, the function itself is called. `trial`, which `prepare` calls first, is the function
    without communication, so that a rank where it fails leaves no other waiting for it.
    """

    name: str
    function: Function
    make_graph: MakeGraph | None = None
    trial: Function | None = None
    _graphs: dict[tuple[Any, ...], tuple[CudaGraph, Inputs, Any]] = field(default_factory=dict, init=False)

    def prepare(self, *inputs: Tensor | float) -> None:
        """Try it, so that it fails now if it fails; capture it: tensors are copied into its own, numbers are constants."""
        trial = self.trial or self.function
        if self.make_graph is None:
            trial(*inputs)
            return
        key = signature(inputs)
        if key in self._graphs:
            return
        own: Inputs = tuple(torch.empty_like(i).copy_(i) if isinstance(i, Tensor) else i for i in inputs)
        graph = self.make_graph()
        graph.warm_up(lambda: trial(*own))
        with graph.capture():
            result = self.function(*own)
        self._graphs[key] = graph, own, result
        if count_ranks() == 1:  # others would have to replay too
            graph.replay()

    def fails(self, calls: Sequence[Inputs]) -> str | None:
        """Prepare it for these calls; why it cannot be, None if it can. Raises a lack of memory."""
        gc.collect()
        gc.disable()  # what it frees could break a capture
        try:
            for inputs in calls:
                self.prepare(*inputs)
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except Exception as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        finally:
            gc.enable()
        return None

    def __call__(self, *inputs: Tensor | float) -> Any:
        key = signature(inputs) if self._graphs else ()
        if key not in self._graphs:
            return self.function(*inputs)
        graph, own, result = self._graphs[key]
        for static, new in zip(own, inputs, strict=True):
            if isinstance(static, Tensor) and isinstance(new, Tensor):
                static.copy_(new, non_blocking=True)
        graph.replay()
        return result

    def reserved_bytes(self) -> int:
        """What its graphs hold of torch's memory, which counts it as reserved and not as allocated."""
        return sum(graph.reserved_bytes for graph, _, _ in self._graphs.values())

    def reset(self) -> None:
        """Give the graphs back: a process group cannot be destroyed while one that uses it exists."""
        for graph, _, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def signature(inputs: Sequence[Tensor | float]) -> tuple[Any, ...]:
    """What a graph is made for: shapes and types of tensors, and numbers. It copies inputs, of any strides, into its own."""
    return tuple((i.shape, i.dtype) if isinstance(i, Tensor) else i for i in inputs)


def choose(
    engines: Sequence[Engine],
    calls: Sequence[Inputs],
    warn: Callable[[str], None],
    restoring: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Engine:
    """The first of some engines of one function that works on every rank, prepared for calls like those to come.

    A collective: the ranks take the same. Giving one up is a warning. No trace of a trial is left: what the function
    changes is put back by `restoring`. Raises a lack of memory.
    """
    for engine, following in pairwise(engines):
        with restoring():
            reason = engine.fails(calls)
        failed = {rank: why for rank, why in enumerate(gather(reason)) if why}
        if not failed:
            return engine
        engine.reset()
        rank, why = next(iter(failed.items()))
        where = "here" if count_ranks() == 1 else f"on rank {rank}"
        warn(f"engine {engine.name} does not work {where}, going on with {following.name}: {why}")
    return engines[-1]


def make_graphs(device: torch.device) -> MakeGraph:
    """What captures on this device. Raises RuntimeError where nothing does."""
    if device.type != "cuda":
        raise RuntimeError(f"a {device.type} cannot capture graphs, a GPU can")
    return partial(CudaGraph, device, [torch.cuda.graph_pool_handle()], torch.cuda.Stream(device))


def compile_network(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compiled for each batch size on its own. Raises, when called, where a part of it cannot be compiled."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    torch._dynamo.config.recompile_limit = 64  # networks of many runs share their code, and the limit counts that
    return torch.compile(network, dynamic=False, fullgraph=True)
