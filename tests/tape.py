"""A graph of the CPU for the tests: it freezes what a CUDA graph freezes, addresses and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.training.engine import WARMUP_CALLS


class Tape(TorchDispatchMode):
    """Records every operator with its arguments; `replay` runs them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def warm_up(self, work: Callable[[], Any]) -> None:
        for _ in range(WARMUP_CALLS):
            work()

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self:
            yield

    def reset(self) -> None:
        self.calls.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, kept in self.calls:
                made = func(*args, **kwargs)
                for old, new in zip(tree_leaves(kept), tree_leaves(made), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
