"""A graph of the CPU for the tests, which forgives nothing that a CUDA graph would not.

A CUDA graph records addresses and launches. So the tape raises on what cannot be captured: a value that the host
reads, a size that depends on values, memory of the host, a generator that the graph does not know. It keeps weak
references alone to memory that was there before the capture, and raises at a replay if that was freed. All memory
that was taken during a capture belongs to one arena; each replay of any graph of the arena begins by poisoning all of
it with NaN, so that nothing survives there from one call to the next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from harness.training.engine import WARMUP_CALLS

FORBIDDEN = {
    "the host reads a value": (
        "_local_scalar_dense", "equal", "is_nonzero", "allclose", "numpy", "tolist", "cpu", "__array__", "item",
        "__bool__", "__int__", "__float__", "__index__", "_is_all_true", "_is_any_true",
    ),
    "a size depends on values": (
        "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
        "argwhere", "unique",
    ),
    "a copy from memory of the host": ("from_numpy", "lift_fresh", "lift_fresh_copy", "tensor", "as_tensor", "frombuffer"),
    "an allocation of pinned memory": ("pin_memory", "_pin_memory"),
    "a storage changes its size": ("resize_", "resize_as_", "set_"),
}  # fmt: skip
REASONS = {name: reason for reason, names in FORBIDDEN.items() for name in names}
SYNCHRONISATIONS = (
    "torch.cuda.synchronize", "torch.cuda.Stream.synchronize", "torch.cuda.Event.synchronize", "torch.cpu.synchronize",
    "torch.cuda.empty_cache", "torch.cuda.memory_stats", "torch.manual_seed", "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all", "torch.cuda.Stream.query", "torch.cuda.Event.query", "torch.cuda.Event.elapsed_time",
    "torch.seed", "torch.initial_seed", "torch.get_rng_state", "torch.set_rng_state", "torch.random.get_rng_state",
    "torch.random.set_rng_state",
)  # fmt: skip
HEALTH_CHECKS = (
    "_accelerator_graph_capture_health_check",
    "_cuda_graph_capture_health_check",
)  # by torch's version


COLLECTIVES = ("allreduce_", "broadcast_", "_allgather_base_", "allgather_", "reduce_scatter_", "barrier")


class CaptureError(RuntimeError):
    """CUDA would say: operation not permitted when stream is capturing."""


class _Refuse(TorchFunctionMode):
    """What never comes to the dispatcher where both sides are a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in REASONS:
            raise CaptureError(f"{name} in a capture: {REASONS[name]}")
        if (kwargs or {}).get("pin_memory"):
            raise CaptureError(f"{name} in a capture: an allocation of pinned memory")
        return func(*args, **(kwargs or {}))


def _refuse_uncapturable(optimizer: torch.optim.Optimizer) -> None:
    """What those of torch.optim that know the word ask of a GPU, and never of a CPU."""
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise CaptureError(f"a step of {type(optimizer).__name__} in a capture: its capturable is False")


@dataclass
class Arena:
    """The memory that all graphs of a run share."""

    tapes: weakref.WeakSet[Tape] = field(default_factory=weakref.WeakSet)  # they live as long as their users
    sealed: bool = False  # set-up is over: a capture raises

    def __call__(self) -> Tape:
        """Make a graph."""
        return Tape(self)

    def poison(self) -> None:
        """What other work of the arena would leave: no byte of it survives."""
        for tape in self.tapes:
            for storage in tape.storages.values():
                # all ones: NaN in every floating type, -1 in every integer
                torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).fill_(0xFF)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Outside:
    """A tensor that was there before the capture: its address, and nothing that keeps it."""

    storage: StorageWeakRef
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    op: str

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise CaptureError(f"{self.op}: a graph is replayed whose memory was freed after the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Tape(TorchDispatchMode):
    """Records every operator with its arguments; `replay` runs them again on the same memory."""

    capturing: Tape | None = None  # of this process

    def __init__(self, arena: Arena | None = None) -> None:
        super().__init__()
        self.arena = Arena() if arena is None else arena
        self.arena.tapes.add(self)
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.storages: dict[int, torch.UntypedStorage] = {}  # taken during the capture, by address of their header
        self.replays = 0
        self.reserved_bytes = 0
        self.state = "new"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        self._refuse(name, args, kwargs)
        out = func(*args, **kwargs)
        given = {_header(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (header := _header(leaf)) not in given:
                self.storages[header] = leaf.untyped_storage()
        reference = self._reference(name)
        self.calls.append((func, tree_map(reference, args), tree_map(reference, kwargs), tree_map(reference, out)))
        return out

    def _refuse(self, name: str, args: Any, kwargs: Any) -> None:
        if name in COLLECTIVES:
            raise CaptureError(f"{name} in a capture would be done now: install_collectives() lets it be recorded")
        if name in REASONS:
            raise CaptureError(f"{name} in a capture: {REASONS[name]}")
        if name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], Tensor):
            raise CaptureError(f"{name} in a capture: a size depends on values")
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks and (name == "index" or args[2].numel() != 1):
                raise CaptureError(f"{name} by a mask in a capture: a size depends on values")
        if kwargs.get("generator") is not None:
            raise CaptureError(f"{name} in a capture: a generator that the graph does not know")
        if kwargs.get("pin_memory"):
            raise CaptureError(f"{name} in a capture: an allocation of pinned memory")

    def _reference(self, op: str) -> Callable[[Any], Any]:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or _header(leaf) in self.storages:
                return leaf
            storage = StorageWeakRef(leaf.untyped_storage())
            return _Outside(storage, leaf.storage_offset(), leaf.size(), leaf.stride(), leaf.dtype, op)

        return one

    def warm_up(self, work: Callable[[], Any]) -> None:
        for _ in range(WARMUP_CALLS):
            work()
        self.state = "warm"

    @contextmanager
    def capture(self) -> Iterator[None]:
        if self.state != "warm":
            raise CaptureError(
                f"a {self.state} graph is captured: libraries must be warm, and a graph is used once"
            )
        if self.arena.sealed:
            raise CaptureError("a capture after the set-up")
        self.state = "failed"
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Tape, "capturing", self))
            for name in SYNCHRONISATIONS:
                error = CaptureError(f"{name} in a capture")
                stack.enter_context(mock.patch(name, side_effect=error))
            for name in (check for check in HEALTH_CHECKS if hasattr(torch.optim.Optimizer, check)):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name, _refuse_uncapturable))
            stack.enter_context(_Refuse())
            stack.enter_context(self)
            yield
        self.state = "captured"
        self.arena.poison()  # nothing has been computed yet

    def replay(self) -> None:
        if self.state != "captured":
            raise CaptureError(f"a {self.state} graph is replayed")
        self.replays += 1
        self.arena.poison()
        with torch.no_grad():
            for func, args, kwargs, kept in self.calls:
                made = func(*tree_map(_present, args), **tree_map(_present, kwargs))
                for old, new in zip(tree_leaves(kept), tree_leaves(made), strict=True):
                    if isinstance(new, Tensor):
                        old = _present(old).detach()
                        if old.data_ptr() != new.data_ptr():
                            old.copy_(new)
                    elif hasattr(new, "wait"):
                        new.wait()

    def reset(self) -> None:
        """Give its memory back."""
        self.calls.clear()
        self.storages.clear()
        self.state = "reset"
        self.arena.tapes.discard(self)


def install_collectives() -> None:
    """In this process, for good: as with NCCL, an all-reduce in a capture is recorded and not done, and takes a connection that
    an earlier one of its size and type has made."""
    all_reduce, connected = dist.all_reduce, set[Any]()

    def recorded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        tape, kind = Tape.capturing, (tensor.numel(), tensor.dtype)
        if tape is None:
            connected.add(kind)
            return all_reduce(tensor, *args, **kwargs)
        if kind not in connected:
            raise CaptureError(f"an all-reduce of {kind} in a capture: NCCL would connect in it")
        if not tensor.is_contiguous():
            raise CaptureError("an all-reduce of strided memory")
        tape.calls.append((all_reduce, (tape._reference("all_reduce")(tensor), *args), kwargs, None))
        return None

    dist.all_reduce = recorded


def _header(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _present(leaf: Any) -> Any:
    return leaf.tensor() if isinstance(leaf, _Outside) else leaf
