"""What a captured step reads of an optimizer: torch's own, by every way of their kernels, and plug-ins' that freeze a number."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tape import Tape
from test_plugin_parts import _unloaded, expand  # noqa: F401 (a fixture)
from test_plugins import write
from torch import Tensor, nn

from harness.loaders.datasets import load_dataset
from harness.models.variants import Recipe
from harness.plugins import PluginError, load_file
from harness.spec import RunPaths
from harness.training.engine import Engine, choose
from harness.training.fit import try_out
from harness.training.recipe import OPTIMIZERS, make_optimizer, set_lr

MODULES = {"Adafactor": "_adafactor", "Muon": "_muon"}
NAMES = (
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor", "Muon",
)  # fmt: skip
FIELDS: dict[str, Any] = {"SGD": {"momentum": 0.9}, "Adagrad": {"lr_decay": 0.5}, "RMSprop": {"momentum": 0.9}}
RATES = (0.1, 0.01, 0.5, 0.0)


def ways(name: str) -> Iterator[dict[str, bool]]:
    """Kernel by kernel, many tensors at once, fused; capturable or not."""
    known = inspect.signature(getattr(torch.optim, name)).parameters
    kernels: list[dict[str, bool]] = [{way: way == chosen for way in ("foreach", "fused") if way in known}
                                      for chosen in ("", "foreach", "fused") if not chosen or chosen in known]  # fmt: skip
    for kernel, capturable in product(kernels, (True, False) if "capturable" in known else (None,)):
        yield kernel | ({} if capturable is None else {"capturable": capturable})


CASES = [pytest.param(name, way, id=f"{name}-{'-'.join(w for w, on in way.items() if on) or 'plain'}")
         for name in NAMES for way in ways(name)]  # fmt: skip


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """torch.optim takes this CPU for what can be captured, and adds to counts as it does on a GPU."""
    with ExitStack() as stack:
        for name in NAMES:
            module = import_module(f"torch.optim.{MODULES.get(name, name.lower())}")
            if hasattr(module, "_get_capturable_supported_devices"):
                known = mock.patch.object(module, "_get_capturable_supported_devices", return_value=["cpu"])
                stack.enter_context(known)
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cpu", new=False, create=True))
        # Adagrad's counts are on the host, where reading them is no fault in a capture
        adagrad = import_module("torch.optim.adagrad")
        stack.enter_context(mock.patch.object(adagrad, "_get_value", read_on_the_host))
        yield


def read_on_the_host(count: Tensor) -> float:
    return ctypes.c_float.from_address(count.data_ptr()).value


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(4, 4, device="cpu"))


class Stepping:
    """An optimizer, whose first step makes its state, and its steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        (self.weights,) = optimizer.param_groups[0]["params"]
        self(torch.ones(4, 4))

    def __call__(self, gradient: Tensor) -> None:
        self.weights.grad = gradient.clone()
        self.optimizer.step()

    def capture(self) -> Engine | str:
        """Captured, as if it had not been tried; or why it cannot be."""
        state = self.optimizer.state[self.weights]
        tensors = [self.weights, *(value for value in state.values() if isinstance(value, Tensor))]
        before, refused = [tensor.detach().clone() for tensor in tensors], list[str]()
        engines = Engine("graph", self, Tape), Engine("eager", self)
        engine = choose(engines, [(torch.ones(4, 4),)], refused.append)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return refused[0] if refused else engine


def furthest(captured: torch.optim.Optimizer, eager: torch.optim.Optimizer) -> float | str:
    """How far its weights come from those of the one without a graph, over drops of the lr; or why it is refused."""
    stepping, alone = Stepping(captured), Stepping(eager)
    engine = stepping.capture()
    if isinstance(engine, str):
        return engine
    far = []
    for number, lr in enumerate(RATES):
        set_lr(captured, lr)
        set_lr(alone.optimizer, lr)
        gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
        engine(gradient)
        alone(gradient)
        far.append(float((stepping.weights - alone.weights).detach().abs().max()))
    return max(far)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("name", "way"), CASES)
def test_each_optimizer_of_torch_follows_the_lr_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, way: dict[str, bool]
) -> None:
    """By torch in its constructor; by ours; by the capture, so that the step is eager with a warning. Never frozen in silence."""
    make = getattr(torch.optim, name)

    def own(groups: Any, lr: Any) -> torch.optim.Optimizer:
        kernels = {what: on and (what != "capturable" or isinstance(lr, Tensor)) for what, on in way.items()}
        return make(groups, lr=lr, **kernels, **FIELDS.get(name, {}))  # type: ignore[no-any-return]

    monkeypatch.setitem(OPTIMIZERS, "own", own)
    recipe = Recipe(duration=1, optimizer="own", weight_decay=0.01)
    on_the_host = name == "Adagrad" and not way["fused"]
    if on_the_host or way == {"foreach": True, "fused": False, "capturable": False}:
        # as on a GPU, memory of no named device is not the weights'
        reason = "on the host" if on_the_host else "lr as a Tensor is not supported"
        with pytest.raises(ValueError, match=reason), torch.device("meta"):
            make_optimizer(recipe, Weights(), lr_on_device=True)
        return
    far = furthest(make_optimizer(recipe, Weights(), lr_on_device=True), make_optimizer(recipe, Weights()))
    works = way.get("fused") if name in ("SGD", "Adagrad") else way.get("capturable")
    if isinstance(far, str):
        assert "engine graph does not work here, going on with eager" in far
        plain = not way.get("foreach") and name in ("RMSprop", "Adadelta")
        assert not works or plain, far
    else:
        assert works
        assert far < 1e-5


FREEZING = """
import torch
from harness import plugin

class Own(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": LR, "steps": 0})
        self.steps = 0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"mean": torch.zeros_like(p), "steps": STEPS}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                COUNT
                p.sub_(state["mean"].lerp_(p.grad, 0.1) * group["lr"])

@plugin.optimizer(capturable=True)
def own(groups, lr):
    return Own(groups, lr)
"""
TENSOR = "torch.zeros((), device=p.device)"


@pytest.mark.parametrize(
    ("lr", "steps", "count", "refused"),
    [
        ("lr", TENSOR, "state['steps'] += 1", ""),
        ("lr", "0", "pass", ""),
        ("float(lr)", TENSOR, "state['steps'] += 1", "keeps lr or state on the host"),
        ("lr", "torch.zeros(())", "state['steps'] += 1", "keeps lr or state on the host"),
        ("lr", "0", "state['steps'] += 1", "makes state in a step"),
        ("lr", TENSOR, "state['steps'] = state['steps'] + 1", "makes state in a step"),
        ("lr", "0", "group['steps'] += 1", "makes state in a step"),
        ("lr", "0", "self.steps += 1", "makes state in a step"),
    ],
)
def test_a_plugin_that_would_freeze_a_number_in_a_graph_is_refused(
    tmp_path: Path, lr: str, steps: str, count: str, refused: str
) -> None:
    """All of these are right without a graph, and captured without a fault."""
    text = FREEZING.replace("LR", lr).replace("STEPS", steps).replace("COUNT", count)
    load_file(write(tmp_path, text))
    trial = (
        "optimizer",
        "own",
        expand(settings={"optimizer": "own"}),
        load_dataset("digits"),
        RunPaths(out=tmp_path),
    )
    if not refused:
        assert "all 23 parameters" in try_out(*trial)
        return
    with pytest.raises(PluginError, match=refused):
        try_out(*trial)


def test_what_is_no_optimizer_is_named_so(tmp_path: Path) -> None:
    load_file(write(tmp_path, FREEZING.replace("return Own(groups, lr)", "return None")))
    expected = "gives NoneType, and a torch.optim.Optimizer is expected"
    with pytest.raises(PluginError, match=expected):
        try_out(
            "optimizer",
            "own",
            expand(settings={"optimizer": "own"}),
            load_dataset("digits"),
            RunPaths(out=tmp_path),
        )


def test_an_lr_that_is_no_tensor_would_go_on_for_ever() -> None:
    """What the test above guards against: set_lr changes nothing."""
    stepping = Stepping(torch.optim.SGD([Weights().kernel], lr=0.1, fused=True))
    engine = stepping.capture()
    assert isinstance(engine, Engine)
    set_lr(stepping.optimizer, 0.0)
    before = stepping.weights.detach().clone()
    engine(torch.ones(4, 4))
    assert not torch.equal(stepping.weights, before)
