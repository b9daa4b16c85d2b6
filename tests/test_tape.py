"""The tests' graph refuses what a CUDA capture refuses, and forgets what a CUDA graph forgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape import Arena, CaptureError, Tape
from torch import Tensor

from harness.training.engine import Engine

X = torch.arange(6.0)
LABELS = torch.tensor([0, 1, 1])
GENERATOR = torch.Generator()


def make_adamw(*, capturable: bool) -> torch.optim.Optimizer:
    """One whose state and gradient are there already."""
    parameter = torch.nn.Parameter(X.clone())
    parameter.grad = torch.ones_like(X)
    optimizer = torch.optim.AdamW([parameter], lr=torch.ones(()), fused=True, capturable=capturable)
    optimizer.state[parameter] = {name: torch.zeros_like(X) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter]["step"] = torch.zeros(())
    return optimizer


FORBIDDEN: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "bool": lambda: bool(X.any()),
    "branch": lambda: 1 if X.isfinite().all() else 0,
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "masked_select": lambda: X.masked_select(X > 1),
    "index by a mask": lambda: X[X > 1],
    "write by a mask": lambda: X.clone().index_put_((X > 1,), torch.ones(4)),
    "unique": lambda: LABELS.unique(),
    "bincount": lambda: LABELS.bincount(),
    "repeat_interleave": lambda: torch.repeat_interleave(LABELS),
    "tensor": lambda: torch.tensor([1.0]),
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "pin_memory": lambda: X.pin_memory(),
    "empty pinned": lambda: torch.empty(3, pin_memory=True),
    "generator": lambda: torch.rand(3, generator=GENERATOR),
    "seed": lambda: torch.manual_seed(1),
    "synchronize": lambda: torch.cuda.synchronize(),
    "resize": lambda: X.clone().resize_(12),
    "state of the generator": lambda: torch.get_rng_state(),
    "fork of the generator": lambda: torch.random.fork_rng(devices=[]).__enter__(),
    "adamw": lambda: make_adamw(capturable=False).step(),
}
ALLOWED: dict[str, Callable[[], Any]] = {
    "masked_fill": lambda: X.masked_fill(X > 1, 0.0),
    "write a number by a mask": lambda: X.clone().index_put_((X > 1,), torch.zeros(())),
    "where of three": lambda: torch.where(X > 1, X, -X),
    "zeros": lambda: torch.zeros(3),
    "index": lambda: X[LABELS],
    "cast": lambda: X.to(torch.bfloat16).float(),
}


def capture(work: Callable[[], Any], arena: Arena | None = None) -> tuple[Tape, Any]:
    tape = (arena or Arena())()
    tape.warm_up(lambda: None)
    with tape.capture():
        result = work()
    return tape, result


@pytest.mark.parametrize("work", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_no_capture_allows(work: Callable[[], Any]) -> None:
    with pytest.raises(CaptureError):
        capture(work)


@pytest.mark.parametrize("work", ALLOWED.values(), ids=ALLOWED)
def test_what_a_capture_allows(work: Callable[[], Any]) -> None:
    tape, result = capture(work)
    tape.replay()
    assert torch.equal(result, work())


def test_an_optimizer_that_can_be_captured_is_replayed() -> None:
    optimizer = make_adamw(capturable=True)
    (parameter,) = optimizer.param_groups[0]["params"]
    tape, _ = capture(optimizer.step)
    tape.replay()
    assert float(optimizer.state[parameter]["step"]) == 1 + 1, "CPU kernels of it are done while they are recorded"


def test_nothing_is_computed_by_a_capture_and_a_replay_computes_it() -> None:
    source = torch.ones(3)
    tape, result = capture(lambda: source * 2)
    assert result.isnan().all()
    source.fill_(4)
    tape.replay()
    assert result.tolist() == [8, 8, 8]


def test_a_result_that_is_kept_is_overwritten_by_any_graph_of_the_arena() -> None:
    arena = Arena()
    captured = Engine("graph", lambda x: x * 2, arena)
    for images in (3, 4):
        captured.prepare(torch.ones(images))
    kept = captured(torch.ones(3))
    assert kept.tolist() == [2, 2, 2]
    captured(torch.ones(4))
    assert kept.isnan().all()
    assert captured(torch.ones(3)).tolist() == [2, 2, 2]


def test_state_that_a_capture_makes_is_lost() -> None:
    """As a momentum that is made at the first step would be, were that step captured."""
    state: dict[str, Tensor] = {}

    def step() -> Tensor:
        if "sum" not in state:
            state["sum"] = torch.zeros(())
        return state["sum"].add_(1)

    tape, _ = capture(step)
    tape.replay()
    tape.replay()
    assert float(state["sum"]) == 1, "zeroed again by each replay"


def test_memory_that_was_freed_after_the_capture_is_missed() -> None:
    held = {"lr": torch.ones(())}
    tape, _ = capture(lambda: X * held["lr"])
    tape.replay()
    held["lr"] = torch.zeros(())
    with pytest.raises(CaptureError, match="memory was freed"):
        tape.replay()


def test_the_order_of_a_graphs_life() -> None:
    arena = Arena()
    with pytest.raises(CaptureError, match="a new graph is replayed"):
        arena().replay()
    with pytest.raises(CaptureError, match="a new graph is captured"), arena().capture():
        pass
    tape, _ = capture(lambda: X + 1, arena)
    tape.reset()
    with pytest.raises(CaptureError, match="a reset graph is replayed"):
        tape.replay()
    arena.sealed = True
    with pytest.raises(CaptureError, match="after the set-up"):
        capture(lambda: X + 1, arena)
