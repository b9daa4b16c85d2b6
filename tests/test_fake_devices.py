"""Every variant on devices that compute nothing: its whole step, and its forward pass on a GPU that is not there.

Shapes, types and devices of every operator are checked as they would be on a GPU, and nothing may wait for a value.
"""

from __future__ import annotations

import pytest
import torch
from steps import (
    CLASSES,
    IMAGES,
    Log,
    batch,
    fused_on_meta,
    make_network,
    move,
    pretend_there_is_a_gpu,
    whole_step,
)  # fmt: skip
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.models.variants import VARIANTS, Variant, VariantFunction
from harness.spec import Precision
from harness.training.step import make_autocast

PRECISIONS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
META, CPU, CUDA = (torch.device(name) for name in ("meta", "cpu", "cuda"))


def smallest(function: VariantFunction) -> Variant:
    for depth in range(3, 100):
        try:
            return function(depth)
        except ValueError:
            continue
    raise AssertionError(f"{function.__name__} has no depth")


EVERY = {function.__name__: smallest(function) for function in VARIANTS.values()}
NETWORKS = {variant.network: name for name, variant in reversed(EVERY.items())}  # recipes share them
every_variant = pytest.mark.parametrize("variant", EVERY.values(), ids=EVERY)
every_network = pytest.mark.parametrize(
    "variant", [EVERY[name] for name in NETWORKS.values()], ids=NETWORKS.values()
)


def check(log: Log, dtype: torch.dtype) -> None:
    assert log.synchronisations == []
    assert log.mixed == []
    # the last layer's gradient may come in as fp32, and is cast
    assert log.computed == {dtype}


@every_variant
def test_a_whole_step_needs_no_value_and_one_device(variant: Variant) -> None:
    with fused_on_meta(), Log() as log:
        step = whole_step(variant, make_network(variant), "fp32", META)
        log.synchronisations.clear()  # of making it
        step(*batch(META), IMAGES)
    check(log, torch.float32)


@every_network
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_whole_step_in_half_precision(variant: Variant, precision: Precision) -> None:
    """Backward on a fake GPU needs a driver, and `meta` knows no autocast: so on a fake CPU, with the CPU's."""
    network = make_network(variant)
    with FakeTensorMode():
        step = whole_step(variant, network, precision, CPU)
        with Log() as log:
            step(*batch(CPU), IMAGES)
    check(log, PRECISIONS[precision])
    assert {parameter.grad.dtype for parameter in step.parameters if parameter.grad is not None} == {torch.float32}


@every_network
def test_forward_on_a_fake_gpu(variant: Variant) -> None:
    network = make_network(variant)
    with FakeTensorMode(), pretend_there_is_a_gpu():
        move(network, CUDA)
        images, _ = batch(CUDA)
        for precision, dtype in PRECISIONS.items():
            with Log() as log, make_autocast(CUDA, precision):
                logits = network(images)
            check(log, dtype)
            assert (logits.shape, logits.device.type) == ((IMAGES, CLASSES), "cuda")
        network.eval()
        with Log() as log, make_autocast(CUDA, "bf16"), torch.no_grad():
            logits = network(images)
        check(log, torch.bfloat16)
