"""A whole training step of any variant on a device that computes nothing, and what it did there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tape import REASONS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.models.build import build
from harness.models.variants import Variant
from harness.spec import Precision, RunSpec
from harness.training.recipe import make_optimizer
from harness.training.setup import make_step
from harness.training.step import Step

IMAGES, IMAGE_SIZE, CLASSES = 8, 32, 10


class Log(TorchDispatchMode):
    """Writes down what a step on a GPU may not do, and the types that convolutions and products computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronisations: list[str] = []
        self.mixed: list[str] = []
        self.computed: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in REASONS:
            self.synchronisations.append(f"{name}: {REASONS[name]}")
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:
            self.mixed.append(f"{name}: {', '.join(sorted(devices))}")
        if name in ("convolution", "convolution_backward", "mm", "addmm", "bmm"):
            self.computed |= {tensor.dtype for tensor in tensors}
        if name == "_fused_sgd_" and devices == {"meta"}:  # in place, and without a form for `meta`
            return None
        return func(*args, **(kwargs or {}))


def make_network(variant: Variant) -> nn.Module:
    """As `assemble` makes it. Call it outside of any mode, and `move` it."""
    network = build(variant.network, CLASSES, IMAGE_SIZE)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def move(network: nn.Module, device: torch.device) -> None:
    """As `network.to(device)` does, which cannot move to what does not compute. Values are lost, strides are not."""
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    store[name] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved


def whole_step(variant: Variant, network: nn.Module, precision: Precision, device: torch.device) -> Step:
    """The step that a run of this variant captures, as `prepare` makes it."""
    move(network, device)
    spec = RunSpec(
        variant=variant.name, network=variant.network, recipe=variant.recipe, dataset="digits", fingerprint="",
        loader="resident", precision=precision, engine="graph", device="cuda",
    )  # fmt: skip
    optimizer = make_optimizer(spec.recipe, network)  # which reads an lr that is a tensor
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros((), device=device)
    scaler = torch.amp.GradScaler("cpu" if device.type == "meta" else device.type, enabled=precision == "fp16")
    scaler.scale(torch.zeros((), device=device))
    prepared = SimpleNamespace(
        spec=spec, network=network, optimizer=optimizer, scaler=scaler, device=device,
        loader_config=SimpleNamespace(world_size=1),
    )  # fmt: skip
    return make_step(prepared, ddp=False)  # type: ignore[arg-type]


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels without values."""
    images = torch.empty(IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE, device=device).contiguous(
        memory_format=torch.channels_last
    )
    return images, torch.empty(IMAGES, dtype=torch.int64, device=device)


@contextmanager
def pretend_there_is_a_gpu() -> Iterator[None]:
    """For what asks torch whether CUDA can be used before it does anything."""
    with (
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
    ):
        yield


@contextmanager
def fused_on_meta() -> Iterator[None]:
    """torch.optim refuses fused kernels on `meta`; `Log` stands in for them."""
    from torch.optim import optimizer

    supported = optimizer._get_fused_kernels_supported_devices()
    with mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", return_value=[*supported, "meta"]):
        yield
