"""Every variant, at two depths, trains two steps by its own recipe and is evaluated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from harness.evaluate import evaluate
from harness.optim import make_optimizer
from harness.run import RunSpec
from harness.train import make_autocast, train_epoch
from loaders.datasets import Split
from loaders.loader import Augment, make_loaders, make_normalize
from models.resnet import build
from models.variants import VARIANTS, VariantFunction, default_depth

SECOND_DEPTH = {"miniplaces": 50, "convnet": 8}


def cases() -> list[Any]:
    found = []
    for function in VARIANTS:
        first = default_depth(function)
        name = function(first).name
        second = SECOND_DEPTH.get(name, first + (9 if "xt-" in name else 12))
        found += [pytest.param(function, depth, id=f"{name}-{depth}") for depth in dict.fromkeys((first, second))]
    return found


@pytest.mark.parametrize(("function", "depth"), cases())
def test_two_steps_and_an_evaluation(function: VariantFunction, depth: int) -> None:
    torch.set_num_threads(1)
    variant = function(depth)
    side = 128 if variant.recipe.crop else 32
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (8, side, side, 3), dtype=np.uint8), np.arange(8) % 4)
    recipe = replace(variant.recipe, batch_size=4, val=0)
    spec = RunSpec(
        variant=variant.name, network=variant.network, recipe=recipe, dataset="none", fingerprint="", loader="resident",
        device="cpu",
    )  # fmt: skip
    device = torch.device("cpu")
    loader, held = make_loaders(
        "resident", split, split,
        augment=Augment(recipe.pad, recipe.pad_mode, recipe.crop, recipe.flip),
        normalize=make_normalize(recipe.normalize, split), batch_size=4, eval_batch_size=8, seed=0, rank=0, world=1,
        device=device, threads=1, channels_last=True,
    )  # fmt: skip
    torch.manual_seed(0)
    network = build(variant.network, 4, recipe.crop or side).to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in network.parameters()]
    metrics = train_epoch(
        network, make_optimizer(recipe, network), torch.amp.GradScaler("cpu", enabled=False), loader, spec,
        epoch=7, steps=2, images=8, world_size=1, device=device, on_first_step=lambda: None,
    )  # fmt: skip
    assert metrics.images == 8
    assert np.isfinite(metrics.loss)
    changed = [not torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True)]
    assert sum(changed) >= 0.9 * len(changed), "nearly every parameter takes part"
    found = evaluate(network, held, images=8, autocast=make_autocast(device, "fp32"))
    assert (found.images, found.error % 12.5) == (8, 0)
